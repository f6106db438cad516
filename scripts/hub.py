"""Lays the ops out as a kernel repository that `kernels` (github.com/huggingface/kernels) loads: `python
scripts/hub.py [FOLDER]`.

What such a repository asks for: build/VARIANT/ is a package that can be imported under any name, so all
imports are relative; its torch ops have a name that no other version has; layers.py holds layers without
state, of which only `forward` is taken. All of that follows from the sources: imports are rewritten, the ops'
namespace gets a digest of what was copied, and the layers are the `forward` functions of vtok_fast.nn.

Variants: torch-cpu and torch-cuda have the Triton kernels and the PyTorch references; one named after a
torch, CUDA and platform, as torch211-cxx11-cu130-x86_64-linux, has the native modules too (they need no
torch, so one build serves every variant).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vtok_fast"
TABLES = ROOT / PACKAGE / "dispatch" / "tables"  # tuned, for the GPUs that are known
LAYERS = {"causal_conv3d": "CausalConv3d", "fsq": "FSQ", "norm_act": "NormAct"}
ENTRY = '''"""vtok-fast as a kernel repository: ops for video tokenizers, and layers without state for `kernelize`."""

from . import layers
from .dispatch.backends import BackendError, available_backends, backend, fallbacks
from .ops.causal_conv3d import causal_conv3d
from .ops.fsq import FSQOutput, fsq_decode, fsq_entropy_loss, fsq_quantize
from .ops.norm_act import norm_act
from .ops.scope_attention import Scope, scope_attention
from .ops.token_packing import PackedTokens, pack_tokens, router_scores, select_tokens
from .ops.token_packing import token_budget, unpack_tokens

__all__ = ["BackendError", "FSQOutput", "PackedTokens", "Scope", "available_backends", "backend",
           "causal_conv3d", "fallbacks", "fsq_decode", "fsq_entropy_loss", "fsq_quantize", "layers", "norm_act",
           "pack_tokens", "router_scores", "scope_attention", "select_tokens", "token_budget", "unpack_tokens"]
'''


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
        '"""Layers without state: `kernelize` puts their `forward` into modules of vtok_fast.nn, or like them."""\n',
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
    import platform

    import torch

    major, minor = torch.__version__.split(".")[:2]
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return f"torch{major}{minor}-cxx11-{cuda}-{platform.machine()}-{sys.platform}"


def write(out: Path, variants: list[str], natives: list[Path]) -> str:
    """Writes the repository, replacing one that is there. Returns the unique name."""
    ops = [
        f"{PACKAGE}.ops.{path.stem}"
        for path in sorted((ROOT / PACKAGE / "ops").glob("*"))
        if not path.stem.startswith("_")
    ]
    sources = needed(ops)
    nn = {f"{PACKAGE}.nn.{file}": (ROOT / PACKAGE / "nn" / f"{file}.py").read_text() for file in LAYERS}
    digest = hashlib.sha256(json.dumps([ENTRY, sources, nn], sort_keys=True).encode())
    tables = sorted(TABLES.glob("*.json"))
    for path in [*natives, *tables]:
        digest.update(path.read_bytes())
    name = f"_{PACKAGE}_{digest.hexdigest()[:12]}"
    version = re.search(r'__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text())[1]
    files = {file_in_package(module): relative(module, source, name) for module, source in sources.items()}
    files |= {"__init__.py": ENTRY, "layers.py": relative(f"{PACKAGE}.layers", layers(nn), name)}

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for variant in variants:
        folder = part / "build" / variant
        backend, plain = "cuda" if "-cu" in variant else "cpu", variant.startswith("torch-")
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        (folder / "metadata.json").write_text(
            json.dumps(
                {
                    "id": name,
                    "name": "vtok-fast",
                    "version": 0,
                    "license": "Apache-2.0",
                    "python-depends": [],
                    "backend": {"type": backend},
                },
                indent=1,
            )
            + "\n"
        )
        for path in () if plain else natives:
            shutil.copy2(path, folder / path.name)
        for path in tables:
            (folder / "dispatch" / TABLES.name).mkdir(exist_ok=True)
            shutil.copy2(path, folder / "dispatch" / TABLES.name / path.name)
    (part / "README.md").write_text(
        f"---\ntags:\n- kernels\nlicense: apache-2.0\n---\nvtok-fast {version}: fast kernels for video "
        "tokenizers, laid out by scripts/hub.py.\n"
    )
    shutil.copy2(ROOT / "LICENSE", part / "LICENSE")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return name


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
        help="may be repeated; default: torch-cpu, torch-cuda and that of the torch here",
    )
    parser.add_argument(
        "--native",
        type=Path,
        action="append",
        metavar="SO",
        help="native modules; default: those in vtok_fast/",
    )
    options = parser.parse_args()
    natives = options.native or sorted((ROOT / PACKAGE).glob("_C*.so"))
    name = write(options.folder, options.variant or ["torch-cpu", "torch-cuda", variant_here()], natives)
    print(
        f"{name} in {options.folder}: "
        f"{', '.join(sorted(p.name for p in (options.folder / 'build').iterdir()))}; native modules: "
        f"{', '.join(p.name for p in natives) or 'none'}"
    )


if __name__ == "__main__":
    main()
