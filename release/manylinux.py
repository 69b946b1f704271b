"""Link what runs wherever manylinux_2_28 does, on a machine whose glibc and libstdc++ are newer.

    python release/manylinux.py build/manylinux    # prints flags for the linker, the LDFLAGS of a build

A linker takes the newest version of every symbol of the C library, ``pthread_create@GLIBC_2.34``, and what it links
needs that glibc from then on. glibc keeps the older versions too, ``pthread_create@GLIBC_2.2.5``. This program writes
libraries without code which define every symbol in its newest version up to glibc 2.28, and has the linker find them
in place of the real ones: a symbol that is newer is an error. The few that the extension takes all the same are in
manylinux.cpp.
"""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

NEWEST = (2, 28)
LIBRARIES = ["libc.so", "libm.so"]
# What libc.so.6 holds since glibc 2.34 is in these before: they must be loaded too. Today they are empty.
ONCE_APART = ["libpthread.so.0", "libdl.so.2", "librt.so.1"]


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def versions(library: Path) -> dict[str, str]:
    """Return every symbol that a library defines with its newest version up to ``NEWEST``."""
    found: dict[str, tuple[int, ...]] = {}
    listing = output_of("nm", "-D", "--defined-only", library)
    for name, version in re.findall(r" (\w+)@@?GLIBC_([\d.]+)$", listing, re.MULTILINE):
        number = tuple(map(int, version.split(".")))
        if number <= NEWEST:
            found[name] = max(number, found.get(name, number))
    return {name: f"GLIBC_{'.'.join(map(str, number))}" for name, number in found.items()}


def write_library(soname: str, symbols: dict[str, str], folder: Path) -> Path:
    """Write a library that defines every symbol in its version, and return it."""
    source, script, library = (folder / f"{soname}{suffix}" for suffix in (".s", ".map", ""))
    define = ".globl our.{0}\n.type our.{0}, @function\nour.{0}: .byte 0\n.size our.{0}, 1\n.symver our.{0}, {0}@@{1}\n"
    definitions = "".join(define.format(*symbol) for symbol in symbols.items())
    source.write_text(f'.text\n{definitions}.section .note.GNU-stack,"",%progbits\n')
    script.write_text("".join(f"{version} {{ local: our.*; }};\n" for version in sorted({*symbols.values()})))
    output_of("cc", "-shared", "-nostdlib", f"-Wl,-soname,{soname},--version-script,{script}", source, "-o", library)
    return library


def linker_flags(folder: Path) -> list[str]:
    """Write the libraries into ``folder``, and return the flags that have the linker take them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        # What -lc and -lm find: the real library, or a script for the linker that names it.
        found = Path(output_of("cc", f"-print-file-name={name}").strip())
        is_library = found.read_bytes()[:4] == b"\x7fELF"
        script = str(found) if is_library else found.read_text()
        real = script if is_library else re.search(rf"\S*/{name}\.6", script)[0]
        library = write_library(f"{name}.6", versions(Path(real)), folder)
        (folder / name).write_text(f"GROUP ( {library} )" if is_library else script.replace(real, str(library)))
    newer, archive = folder / "newer.o", folder / "libnewer.a"
    output_of("c++", "-fPIC", "-O2", "-c", Path(__file__).with_suffix(".cpp"), "-o", newer)
    output_of("ar", "rcs", archive, newer)
    hidden = f"-Wl,--whole-archive,{archive},--no-whole-archive,--exclude-libs,{archive.name}"
    # libstdc++ comes before torch, whose libraries define some of its symbols too, without versions.
    return [f"-L{folder}", hidden, "-Wl,-z,defs,--no-as-needed", "-lstdc++", *(f"-l:{name}" for name in ONCE_APART)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the libraries are written")
    print(shlex.join(linker_flags(parser.parse_args().folder.resolve())))
