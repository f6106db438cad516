"""Another system's headers and libraries, to compile against: `python scripts/sysroot.py FOLDER *.deb`
unpacks Debian packages into FOLDER.

Against an older system, so that a wheel runs there and on all that is newer: its manylinux tag follows from
the C library's functions that it calls, and many have a new version with each release. With those of Debian
11, `dlopen` is that of glibc 2.2.5, and libstdc++ that of GCC 10.

    apt-get download libc6 libc6-dev linux-libc-dev libcrypt1 libcrypt-dev \\
        libgcc-s1 libgcc-10-dev libstdc++6 libstdc++-10-dev      # of Debian 11; :arm64 for aarch64
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def unpack(folder: Path, packages: list[Path]) -> None:
    """Debian packages, one above the other. Their links to absolute places then point into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    root = folder.resolve()
    for place in root.rglob("*"):
        if place.is_symlink() and os.path.isabs(target := os.readlink(place)):
            place.unlink()
            place.symlink_to(os.path.relpath(root / target.lstrip("/"), place.parent))


def headers(folder: Path, machine: str) -> tuple[Path, str]:
    """The folder of the C++ headers, and the release of GCC that they are of. Ends the program where they are
    not there, or not for that machine."""
    found = sorted((folder / "usr" / "include" / "c++").glob("*"), key=lambda path: int(path.name))
    if not found or not (folder / "usr" / "lib" / f"{machine}-linux-gnu" / "libc.so").is_file():
        sys.exit(
            f"sysroot: {folder} has no headers and libraries of C++ for {machine}; the head of "
            "scripts/sysroot.py says which packages have them"
        )
    return found[-1], found[-1].name


def cmake_args(folder: Path, machine: str) -> list[str]:
    """What makes CMake compile and link against the folder, by g++ and by nvcc. Headers with asserts name
    themselves, so its place is left out of what is compiled."""
    folder, triple = folder.resolve(), f"{machine}-linux-gnu"
    cxx, release = headers(folder, machine)
    system = folder / "usr" / "include"
    compiling = [f"--sysroot={folder}", "-nostdinc++", f"-ffile-prefix-map={folder}=."]
    compiling += [f"-isystem{place}" for place in (cxx, system / triple / "c++" / release)]
    places = folder / "usr/lib/gcc" / triple / release, folder / "usr/lib" / triple, folder / "lib" / triple
    linking = " ".join([f"--sysroot={folder}", *(f"-L{place}" for place in places)])
    return [
        f"-DCMAKE_CXX_FLAGS={' '.join(compiling)}",
        f"-DCMAKE_CUDA_FLAGS=-Xcompiler={','.join(compiling)}",
        *(f"-DCMAKE_{kind}_LINKER_FLAGS={linking}" for kind in ("EXE", "MODULE", "SHARED")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack Debian packages to compile against.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", type=Path, nargs="+", metavar="DEB")
    options = parser.parse_args()
    unpack(options.folder, options.packages)


if __name__ == "__main__":
    main()
