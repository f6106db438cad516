"""The layout for Hugging Face's `kernels`: relative imports, an id for each version and variant, the modules
of every Python, layers without state."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.kernel_repository import hub, write_repository
from torch import nn

from vtok_fast import nn as our_nn
from vtok_fast.dispatch import tuning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "repository")


def test_every_import_is_relative(repository):
    folder, ids = repository
    name = ids["torch-cpu"]
    files = sorted(folder.glob("build/torch-cpu/**/*.py"))
    assert {
        "__init__.py",
        "layers.py",
        "dispatch/native.py",
        "ops/fsq/__init__.py",
        "kernels/norm_act.py",
    } <= {str(p.relative_to(folder / "build" / "torch-cpu")) for p in files}
    for path in files:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert all((n or "").split(".")[0] != "vtok_fast" for n in names), path
        assert "vtok_fast::" not in text.replace(f"{name}::", "") and "torch.ops.vtok_fast" not in text, path


def test_layers_have_no_state_and_our_forward(repository):
    """What `kernels` checks before it takes a layer; and beside the installed package, in one process."""
    folder, ids = repository
    name = ids[hub.variant_here()]
    spec = importlib.util.spec_from_file_location(name, folder / "build" / hub.variant_here() / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        plain = {n for n, _ in inspect.getmembers(nn.Module)}
        for layer in ("CausalConv3d", "NormAct", "FSQ"):
            ours, theirs = getattr(module.layers, layer), getattr(our_nn, layer)
            assert ours.__init__ is nn.Module.__init__
            assert {n for n, _ in inspect.getmembers(ours)} - plain <= {"can_torch_compile", "has_backward"}
            assert list(inspect.signature(ours.forward).parameters) == list(
                inspect.signature(theirs.forward).parameters
            )
        conv, x = our_nn.CausalConv3d(4, 6, 3), torch.randn(1, 4, 3, 8, 8)
        torch.testing.assert_close(module.layers.CausalConv3d.forward(conv, x), conv(x))
        norm = our_nn.NormAct(4, activation="silu")
        torch.testing.assert_close(module.layers.NormAct.forward(norm, x), norm(x))
    finally:
        for key in [k for k in sys.modules if k.split(".")[0] == name]:
            del sys.modules[key]


def test_every_version_and_variant_has_its_own_id(tmp_path, monkeypatch):
    """Whatever differs between two builds, down to a native module's bytes, is another id."""
    variants = [
        "torch-cpu",
        "torch-cuda",
        "torch213-cxx11-cpu-x86_64-linux",
        "torch-stable-abi26-cu130-x86_64-linux",
    ]
    module = tmp_path / "_C.cpython-311-x86_64-linux-gnu.so"
    module.write_bytes(b"one")
    first = hub.write(tmp_path / "a", variants, [module])
    assert list(first) == variants and len(set(first.values())) == len(variants)
    assert hub.write(tmp_path / "b", variants, [module]) == first
    again = hub.write(tmp_path / "b", variants, [module], version=2)
    assert not set(again.values()) & set(first.values())
    assert json.loads((tmp_path / "b/build/torch-cpu/metadata.json").read_text())["version"] == 2
    module.write_bytes(b"two")
    other = hub.write(tmp_path / "b", variants, [module])
    assert [other[v] != first[v] for v in variants] == [
        False,
        False,
        True,
        True,
    ]  # those that have the module
    text = hub.template
    monkeypatch.setattr(hub, "template", lambda name: text(name) + "# changed\n")
    assert not set(hub.write(tmp_path / "b", variants, [module]).values()) & set(other.values())


def test_the_command_writes_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub.py", str(tmp_path / "out"), "--version", "3"])
    hub.main()
    said, variants = capsys.readouterr(), {path.name for path in (tmp_path / "out" / "build").iterdir()}
    assert variants == {"torch-cpu", "torch-cuda", "torch-rocm", hub.variant_here()}
    assert all(f"{name}: _vtok_fast_" in said.out for name in variants)
    assert "version=3" in (tmp_path / "out" / "README.md").read_text()
    assert f"{hub.variant_here()}: no native module for Python 3.1" in said.err


@pytest.mark.parametrize(
    "variant",
    [
        "torch",
        "torch-xpu",
        "torch213",
        "torch213-cxx11-cu130",
        "torch213-cxx11-rocm-x86_64-linux",
        "torch-stable-abi-cpu-x86_64-linux",
        "../torch-cpu",
        "torch-cpu-x86_64-linux",
    ],
)
def test_a_variant_that_kernels_would_not_know_is_refused(tmp_path, variant):
    with pytest.raises(ValueError, match="variant: expected torch-cpu, .*got"):
        hub.write(tmp_path / "out", ["torch-cpu", variant], [])
    assert not (tmp_path / "out").exists()


def test_what_would_be_lost_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="folder: .*mine is there"):
        hub.write(tmp_path / "mine", ["torch-cpu"], [])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with pytest.raises(ValueError, match="version: expected 1 or more, got 0"):
        hub.write(tmp_path / "out", ["torch-cpu"], [], version=0)


def wheel(folder: Path, python: str, inside: str = "{name}") -> Path:
    name = f"vtok_fast/_C.cpython-{python}-x86_64-linux-gnu.so"
    path = folder / f"vtok_fast-0.1.0-cp{python}-cp{python}-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inside.format(name=name), python)
        archive.writestr("vtok_fast/__init__.py", "")
    return path


def test_one_variant_holds_the_modules_of_every_python(tmp_path, monkeypatch, capsys):
    """Of wheels, as kernels has no name for a variant of one Python; those that are missing are named."""
    wheels = [wheel(tmp_path, python) for python in ("310", "311", "312")]
    command = [
        "hub.py",
        str(tmp_path / "out"),
        "--variant",
        "torch-cpu",
        "--variant",
        "torch-stable-abi26-cu130-x86_64-linux",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--native", *map(str, wheels)])
    hub.main()
    folder = tmp_path / "out" / "build" / "torch-stable-abi26-cu130-x86_64-linux"
    assert {p.name: p.read_text() for p in folder.glob("*.so")} == {
        f"_C.cpython-{p}-x86_64-linux-gnu.so": p for p in ("310", "311", "312")
    }
    assert not list((tmp_path / "out" / "build" / "torch-cpu").glob("*.so"))
    said = capsys.readouterr().err
    assert "no native module for Python 3.13, 3.14," in said and "no CUDA kernels in _C.cpython-310" in said
    monkeypatch.setattr(
        sys, "argv", ["hub.py", str(tmp_path / "out"), "--native", str(wheels[0]), "--native", str(wheels[0])]
    )
    with pytest.raises(SystemExit, match="hub: --native: two modules named _C.cpython-310"):
        hub.main()
    monkeypatch.setattr(
        sys, "argv", ["hub.py", str(tmp_path / "out"), "--native", str(wheel(tmp_path, "313", "other.so"))]
    )
    with pytest.raises(SystemExit, match="cp313.*this wheel has no native module"):
        hub.main()


def test_tuned_tables_come_along_where_the_dispatcher_looks(tmp_path, monkeypatch):
    plain = hub.write(tmp_path / "a", ["torch-cpu"], [])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "some_gpu.json").write_text("{}")
    monkeypatch.setattr(hub, "TABLES", tmp_path / "tables")
    assert hub.write(tmp_path / "a", ["torch-cpu"], []) != plain
    folder = tmp_path / "a" / "build" / "torch-cpu"
    assert (folder / "dispatch" / "tuning.py").is_file() and (
        folder / "dispatch" / tuning.SHIPPED.name / "some_gpu.json"
    ).is_file()


def test_what_cannot_be_made_relative_is_refused():
    with pytest.raises(ValueError, match="line 1: write"):
        list(hub.imports(ast.parse("import vtok_fast.ops")))
