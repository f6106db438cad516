"""Libraries in the place of CUDA's, so that a torch for GPUs can be loaded without them: `stand_in(FOLDER)`.

They have what torch's own libraries ask for by name and version, as functions that return 100, by which CUDA
says that there is no device: kernels are registered as a library is loaded, and devices are counted. Needs
gcc, and binutils' nm and objdump.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from pathlib import Path

from wheel_trials import run


def stand_in(torch: Path) -> list[str]:
    """Puts a library into the place of each that those of an installed torch load and this machine lacks, and
    returns their names."""
    own = [*(torch / "lib").glob("*.so*"), *torch.glob("*.so")]
    found = re.findall(
        r"^\s*(\S+) => not found$", "".join(run("ldd", library) for library in own), re.MULTILINE
    )
    functions: dict[str, dict[str, str]] = {name: {} for name in sorted(set(found))}
    for library in own:
        for name, (function, version) in versioned(library):
            if name in functions:
                functions[name][function] = version
    for name, wanted in functions.items():
        build(torch / "lib" / name, wanted)
    said = "".join(run("ldd", "-r", library) for library in own)
    left = set(re.findall(r"^undefined symbol: ([^\s,]+)\s", said, re.MULTILINE))
    if functions and (left := {name for name in left if not name.startswith(("Py", "_Py"))}):
        first = next(iter(functions))
        build(torch / "lib" / first, functions[first] | dict.fromkeys(sorted(left), ""))
    return list(functions)


def versioned(library: Path) -> list[tuple[str, tuple[str, str]]]:
    """What a library asks of others by a version: whose it is, its name and the version."""
    owner, of = "", {}
    for line in run("objdump", "-p", library).splitlines():
        if asked := re.match(r"\s*required from (\S+):", line):
            owner = asked[1]
        elif owner and (version := re.match(r"\s+0x[0-9a-f]+ 0x[0-9a-f]+ \d+ (\S+)", line)):
            of[version[1]] = owner
    said = run("nm", "-D", "--undefined-only", "--with-symbol-versions", library)
    return [
        (of[v], (name, v)) for name, v in re.findall(r" U ([^@\s]+)@+(\S+)$", said, re.MULTILINE) if v in of
    ]


def build(place: Path, functions: dict[str, str]) -> None:
    """A library of these functions, each with its version, or without one where that is empty."""
    groups = defaultdict(list)
    for name, version in functions.items():
        groups[version].append(name)
    code = "".join(
        f'long f{i}(void) __asm__("{name}"); long f{i}(void) {{ return 100; }}\n'
        for i, name in enumerate(functions)
    )
    versions = "".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in groups.items() if v)
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "functions.c"), Path(folder, "versions.map")
        source.write_text(code)
        script.write_text(versions)
        options = [f"-Wl,--version-script={script}"] if versions else []
        run("gcc", "-shared", "-fPIC", source, f"-Wl,-soname,{place.name}", *options, "-o", place)
