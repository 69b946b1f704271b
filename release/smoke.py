"""Say whether an installed asa_ops works in this environment, as a row for the table of docs/install.md.

    python release/smoke.py

It fails where a result differs from the reference, or where there is a warning and the extension is not missing.
"""

import platform
import sys
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch

    on_import = len(caught)
    import asa_ops

    assert len(caught) == on_import, "asa_ops warns on import"
    tokens = torch.randn(3, 1, 2, 96, 16, requires_grad=True)
    out = asa_ops.asa_attention(*tokens, 1.0, 1.0, grid=(8, 12))
    (gradient,) = torch.autograd.grad(out.square().sum(), tokens)
    expected = asa_ops.asa_attention(*tokens, 1.0, 1.0, grid=(8, 12), impl="reference")
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), tokens)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)
    maps = torch.randn(3, 1, 8, 6, 5)
    torch.testing.assert_close(
        asa_ops.criss_cross_attention(*maps), asa_ops.criss_cross_attention(*maps, impl="reference")
    )

told = [str(warning.message) for warning in caught if str(warning.message).startswith("asa_ops")]
chosen = asa_ops.explain(tokens[0]).splitlines()[0].rpartition(" ")[2]
libc = " ".join(platform.libc_ver())
print(f"| {platform.python_version()} | {torch.__version__} | {libc} | `{chosen}` | {' '.join(told) or 'none'} |")
sys.exit(len(told) != (chosen == "blocked"))
