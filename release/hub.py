"""Lay the package out as Hugging Face's ``kernels`` loads it: a variant in OUT/build, and OUT/build.toml about it.

    python release/hub.py build/hub    # kernels.get_local_kernel(Path("build/hub")) is then the package

The variant is one of torch's stable ABI, for CPUs or, where there is an nvcc, for CPUs and CUDA: it fits every torch
from 2.10 on. Its ops are in a namespace of its own, named after the commit, so that the package is loaded beside an
installed one and beside other versions.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

from manylinux import linker_flags

ROOT = Path(__file__).parents[1]
NAME, LICENSE, VERSION = "asa-ops", "BSD-3-Clause", 0  # version 0: the interface may still change
KERNELS = "0.17.0"  # the oldest kernels that reads this layout
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["{{kind}}"]

[torch]
src = []  # compiled by asa_ops itself, release/hub.py

[torch.stable-abi]
{{kind}} = "2.10"
"""
ABOUT = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
ops = getattr(torch.ops, sys.argv[2])
print(json.dumps([ops.cuda_architectures().split(";"), ops.cuda_versions()[1]]))
"""


class Backend(NamedTuple):
    """What a variant runs on: its name there, "cpu" or "cu130", and what its metadata says."""

    name: str
    metadata: dict[str, str | list[str]]

    @property
    def variant(self) -> str:
        return f"torch-stable-abi210-{self.name}-{platform.machine()}-linux"


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def identifier() -> str:
    """Return a name for the commit that is checked out, with files that are not in it "_dirty"."""
    changed = "_dirty" if output_of("git", "status", "--porcelain", "asa_ops", "csrc", "setup.py") else ""
    return f"_asa_ops_{output_of('git', 'rev-parse', '--short=10', 'HEAD')}{changed}"


def build(namespace: str, folder: Path) -> Path:
    """Build a wheel whose ops are in ``namespace``, and return the package that is in it."""
    flags = " ".join(linker_flags(folder / "manylinux"))
    environment = os.environ | {"ASA_OPS_NAMESPACE": namespace, "ASA_OPS_REQUIRE_EXT": "1", "LDFLAGS": flags}
    sources = folder / "source"  # a copy: what is built for another namespace stays out of build/
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "tests", "results")
    shutil.copytree(ROOT, sources, ignore=ignored)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*wheel, "--no-deps", "--wheel-dir", folder, sources], check=True, env=environment)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "wheel", "zip")
    return folder / "wheel" / "asa_ops"


def backend_of(package: Path, namespace: str) -> Backend:
    """Ask the extension of a package what it was built for."""
    answer = output_of(sys.executable, "-c", ABOUT, package / "_C.abi3.so", namespace)
    architectures, cuda = json.loads(answer)
    if architectures == [""]:
        return Backend("cpu", {"type": "cpu"})
    return Backend(f"cu{cuda // 1000}{cuda % 1000 // 10}", {"type": "cuda", "archs": capabilities(architectures)})


def capabilities(architectures: list[str]) -> list[str]:
    """Return "80", "90a" as "8.0+PTX", "9.0a": of the last without a letter there is PTX."""
    portable = [arch for arch in architectures if arch.isdigit()]
    return [re.sub(r"(\d)(a?)$", r".\1\2", arch) + "+PTX" * (arch in portable[-1:]) for arch in architectures]


def lay_out(package: Path, namespace: str, backend: Backend, out: Path) -> Path:
    """Write the variant of a package into ``out``, and return its folder."""
    variant = out / "build" / backend.variant
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(file for file in variant.rglob("*") if file.is_file())
    digest = {
        str(file.relative_to(variant)): b64encode(hashlib.sha256(file.read_bytes()).digest()).decode() for file in files
    }
    metadata = {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": backend.metadata,
        "kernels-minver": KERNELS,
        "digest": {"algorithm": "sha256", "files": digest},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "build.toml").write_text(BUILD.format(kind=backend.metadata["type"]))
    return variant


def check(variant: Path) -> None:
    """Hold a variant to what the Hub asks of binaries, and run a call of it as ``kernels`` loads it."""
    import torch
    from kernel_abi_check import ObjectFile
    from kernels import get_local_kernel

    binary = ObjectFile(variant / "_C.abi3.so")
    if found := [*binary.check_manylinux("manylinux_2_28"), *binary.check_python_abi("3.10")]:
        sys.exit(f"{variant}: {found}")
    package = get_local_kernel(variant)
    tokens = torch.randn(1, 2, 64, 16)
    print(package.explain(tokens))
    print(package.asa_attention(tokens, tokens, tokens, 1.0, 1.0, grid=(8, 8)).shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    out, namespace = parser.parse_args().out.resolve(), identifier()
    with tempfile.TemporaryDirectory() as folder:
        built = build(namespace, Path(folder))
        variant = lay_out(built, namespace, backend_of(built, namespace), out)
    check(variant)
    print(variant)
