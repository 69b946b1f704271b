"""Build the compiled extension asa_ops/_C.abi3.so; everything else is in pyproject.toml.

Without a working C++ compiler the package installs all the same, with its PyTorch implementations only.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

VERSION = "0.1.0"


def why_no_compiler() -> str | None:
    """Try the compiler that torch's build would use on an empty program; return why it does not work, or None."""
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = get_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cstdint>\nint main() { return 0; }\n")
        try:
            subprocess.run(
                [*shlex.split(compiler), source, "-o", Path(folder, "probe")], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            return f"the C++ compiler {compiler!r} does not work: {error}"
    return None


def extension() -> dict:
    """Return setup()'s arguments for the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    major, minor, patch = (int(part) for part in VERSION.split("."))
    module = CppExtension(
        "asa_ops._C",
        sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10
            ("TORCH_STABLE_ONLY", None),
            ("ASA_OPS_VERSION", str(10000 * major + 100 * minor + patch)),
        ],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-Wall",
            "-fvisibility=hidden",
            "-g0",
            f"-ffile-prefix-map={Path.cwd()}=.",
        ],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else [],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_no_compiler()
if reason:
    print(f"asa_ops: building without the compiled extension ({reason})", file=sys.stderr)
setup(version=VERSION, **({} if reason else extension()))
