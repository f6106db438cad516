"""Lays the ops out as a kernel repository that `kernels` (github.com/huggingface/kernels) loads: `python
scripts/hub.py [FOLDER]`.

What such a repository asks for: build/VARIANT/ is a package that can be imported under any name, so all
imports are relative; its id and the namespace of its torch ops are those of no other version and variant;
layers.py holds layers without state, of which only `forward` is taken. All of that follows from the sources:
imports are rewritten, the id is a digest of what a variant holds, and the layers are the `forward` functions
of vtok_fast.nn.

Variants: torch-cpu, torch-cuda and torch-rocm have the Triton kernels and the PyTorch references. One with a
platform has the native modules too, of every Python that `--native` gives: torch211-cxx11-cu130-x86_64-linux
for torch 2.11, torch-stable-abi26-cu130-x86_64-linux for torch 2.6 and newer (they need no torch).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vtok_fast"
TABLES = ROOT / PACKAGE / "dispatch" / "tables"  # tuned, for the GPUs that are known
LAYERS = {"causal_conv3d": "CausalConv3d", "fsq": "FSQ", "norm_act": "NormAct"}
PYTHONS = ("310", "311", "312", "313", "314")  # what pyproject.toml admits and wheels are built for
VARIANT = re.compile(
    r"torch-(?P<portable>cpu|cuda|rocm)|(torch-stable-abi\d{2,}|torch\d{2,}(-cxx(11|98))?)-(?P<native>cpu|cu\d{2,})-\w+-[a-z]+"
)
PORTABLE = ("torch-cpu", "torch-cuda", "torch-rocm")
TEMPLATES = ROOT / "scripts" / "hub_templates"


def template(name: str) -> str:
    return (TEMPLATES / name).read_text()


def file_of(module: str) -> Path:
    """`vtok_fast.ops.fsq` in the source tree, where vtok_fast.kernels is the folder kernels."""
    parts = module.split(".")
    path = (
        ROOT.joinpath("kernels", *parts[2:]) if parts[:2] == [PACKAGE, "kernels"] else ROOT.joinpath(*parts)
    )
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[ast.ImportFrom, list[str]]]:
    """Every `from vtok_fast... import ...`, with the modules that it needs. Raises ValueError for what cannot
    be made relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(
                f"line {node.lineno}: write `from vtok_fast import ...`, which can be made relative"
            )
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == PACKAGE:
            submodules = [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if file_of(f"{node.module}.{alias.name}").is_file()
            ]
            yield node, submodules or [node.module]


def needed(first: list[str]) -> dict[str, str]:
    """The sources of these modules and of all that they import from the package."""
    found, waiting = {}, list(first)
    while waiting:
        module = waiting.pop()
        if module in found or module == PACKAGE:
            continue
        found[module] = file_of(module).read_text()
        waiting += [m for _, modules in imports(ast.parse(found[module])) for m in modules]
        waiting.append(module.rpartition(".")[0])
    return found


def relative(module: str, source: str, name: str) -> str:
    """The source with relative imports, and its torch ops in the namespace `name`."""
    is_package = file_of(module).name == "__init__.py"
    dots = "." * (module.count(".") + is_package)
    lines = source.splitlines(keepends=True)
    for node, _ in imports(ast.parse(source)):
        before = f"from {node.module} import"
        if before not in lines[node.lineno - 1]:
            raise ValueError(f"{module}, line {node.lineno}: expected `{before}`")
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(
            before, f"from {dots}{node.module[len(PACKAGE) + 1 :]} import"
        )
    text = "".join(lines).replace(f'import_module("{PACKAGE}._C")', f'import_module("{dots}_C", __package__)')
    return text.replace(f"{PACKAGE}::", f"{name}::").replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{name}.")


def layers(sources: dict[str, str]) -> str:
    """layers.py: of each layer in vtok_fast.nn only its `forward`, as source text."""
    parts = [
        '"""Layers without state: `kernelize` puts their `forward` into others like them."""\n',
        "from __future__ import annotations\n",
        "import torch",
        "from torch import Tensor, nn\n",
    ]
    bodies = []
    for file, layer in LAYERS.items():
        source = sources[f"{PACKAGE}.nn.{file}"]
        tree = ast.parse(source)
        parts += [ast.unparse(node) for node, _ in imports(tree)]
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == layer)
        (forward,) = (
            node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "forward"
        )
        text = "".join(source.splitlines(keepends=True)[forward.lineno - 1 : forward.end_lineno])
        bodies.append(
            f'\n\nclass {layer}(nn.Module):\n    """`forward` of vtok_fast.nn.{layer}."""\n\n'
            f"    can_torch_compile = True\n    has_backward = True\n\n{text.rstrip()}\n"
        )
    return "\n".join(parts) + "\n" + "".join(bodies)


def variant_here() -> str:
    """The name of this machine's variant, after its torch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return f"torch{major}{minor}-cxx11-{cuda}-{platform.machine()}-{sys.platform}"


def modules_of(paths: list[Path], folder: Path) -> list[Path]:
    """The native modules themselves, where some paths are wheels: those are unpacked into `folder`. Raises
    ValueError for a wheel without one, and for two modules of one name."""
    found = []
    for path in paths:
        if path.suffix != ".whl":
            found.append(path)
            continue
        with zipfile.ZipFile(path) as wheel:
            inside = [name for name in wheel.namelist() if re.fullmatch(rf"{PACKAGE}/_C[^/]*\.so", name)]
            if not inside:
                raise ValueError(f"--native {path}: this wheel has no native module")
            place = folder / path.name
            found += [Path(wheel.extract(name, place)) for name in inside]
    names = [path.name for path in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--native: two modules named {', '.join(twice)}; one repository holds one family")
    return sorted(found, key=lambda path: path.name)


def warnings_for(variants: list[str], natives: list[Path]) -> list[str]:
    """What a variant promises by its name and these modules do not keep."""
    said = []
    if native := [name for name in variants if VARIANT.fullmatch(name)["native"]]:
        have = {tag for path in natives for tag in re.findall(r"cpython-(\d+)-", path.name)}
        if missing := [f"{tag[0]}.{tag[1:]}" for tag in PYTHONS if tag not in have]:
            said.append(
                f"{', '.join(native)}: no native module for Python {', '.join(missing)}, where the ops will "
                "run on Triton and PyTorch; --native adds modules or wheels"
            )
    if gpu := [name for name in native if VARIANT.fullmatch(name)["native"] != "cpu"]:
        without = [path.name for path in natives if b".nv_fatbin" not in path.read_bytes()]
        if without:
            said.append(f"{', '.join(gpu)}: no CUDA kernels in {', '.join(without)}")
    return said


def write(out: Path, variants: list[str], natives: list[Path], version: int = 1) -> dict[str, str]:
    """Writes the repository, replacing one that is there. Returns each variant's id. `version` is the number
    that `get_kernel` asks for. Raises ValueError for a variant that kernels would not know, a version below
    1, and a folder of other things."""
    for variant in variants:
        if VARIANT.fullmatch(variant) is None:
            raise ValueError(
                "variant: expected torch-cpu, torch-cuda, torch-rocm, or a name such as "
                f"torch211-cxx11-cu130-x86_64-linux or torch-stable-abi26-cu130-x86_64-linux, got {variant!r}"
            )
    if version < 1:
        raise ValueError(f"version: expected 1 or more, got {version}")
    if out.exists() and not (
        out.is_dir() and (not any(out.iterdir()) or any(out.glob("build/*/metadata.json")))
    ):
        raise ValueError(f"folder: {out} is there and is not such a repository, which this would replace")
    ops = [
        f"{PACKAGE}.ops.{path.stem}"
        for path in sorted((ROOT / PACKAGE / "ops").glob("*"))
        if not path.stem.startswith("_")
    ]
    sources = needed([*ops, f"{PACKAGE}.dispatch.available"])
    nn = {f"{PACKAGE}.nn.{file}": (ROOT / PACKAGE / "nn" / f"{file}.py").read_text() for file in LAYERS}
    home, api = template("home.py"), template("api.py")
    tables = sorted(TABLES.glob("*.json"))
    release = re.search(r'__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text())[1]

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ids = {}
    for variant in variants:
        native = VARIANT.fullmatch(variant)["native"]
        copied, text = (natives, api + template("native.py")) if native else ([], api)
        digest = hashlib.sha256(
            json.dumps([home, text, sources, nn, variant, version, release], sort_keys=True).encode()
        )
        for path in [*copied, *tables]:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
        name = ids[variant] = f"_{PACKAGE}_{digest.hexdigest()[:16]}"
        files = {
            file_in_package(module): relative(module, source, name) for module, source in sources.items()
        }
        files |= {
            "__init__.py": home.replace("@ID@", name),
            "api.py": text,
            "layers.py": relative(f"{PACKAGE}.layers", layers(nn), name),
            "metadata.json": metadata(name, version, backend_of(variant)),
        }
        folder = part / "build" / variant
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(content)
        for path in copied:
            shutil.copy2(path, folder / path.name)
        for path in tables:
            (folder / "dispatch" / TABLES.name).mkdir(exist_ok=True)
            shutil.copy2(path, folder / "dispatch" / TABLES.name / path.name)
    (part / "README.md").write_text(
        template("README.md").replace("@RELEASE@", release).replace("@VERSION@", str(version))
    )
    shutil.copy2(ROOT / "LICENSE", part / "LICENSE")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return ids


def backend_of(variant: str) -> str:
    """What kernels calls the device that a variant is for."""
    if VARIANT.fullmatch(variant)["portable"]:
        return variant.removeprefix("torch-")
    return "cuda" if "-cu" in variant else "cpu"


def metadata(name: str, version: int, backend: str) -> str:
    facts = {
        "id": name,
        "name": "vtok-fast",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    return json.dumps(facts, indent=1) + "\n"


def file_in_package(module: str) -> str:
    inside = module.removeprefix(f"{PACKAGE}.").replace(".", "/")
    return f"{inside}/__init__.py" if file_of(module).name == "__init__.py" else f"{inside}.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Lay the ops out as a repository for Hugging Face's kernels."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "hub")
    parser.add_argument(
        "--variant",
        action="append",
        help=f"may be repeated; default: {', '.join(PORTABLE)} and that of the torch here",
    )
    parser.add_argument(
        "--native",
        type=Path,
        action="extend",
        nargs="+",
        metavar="FILE",
        help="native modules, or wheels that have one, each for one Python; default: those in vtok_fast/",
    )
    parser.add_argument(
        "--version",
        type=int,
        default=1,
        metavar="N",
        help="what get_kernel(..., version=N) asks for, on the Hub the branch vN; default: 1",
    )
    options = parser.parse_args()
    variants = options.variant or [*PORTABLE, variant_here()]
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            natives = modules_of(options.native or sorted((ROOT / PACKAGE).glob("_C*.so")), Path(unpacked))
            ids = write(options.folder, variants, natives, options.version)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            sys.exit(f"hub: {error}")
        for text in warnings_for(variants, natives):
            print(f"hub: warning: {text}", file=sys.stderr)
    print(f"{options.folder}: native modules: {', '.join(path.name for path in natives) or 'none'}")
    for variant, name in ids.items():
        print(f"  {variant}: {name}")


if __name__ == "__main__":
    main()
