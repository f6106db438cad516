"""The layout for Hugging Face's `kernels`: it imports under any name, beside another version, and its layers
have no state."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vtok_fast.dispatch import native, tuning
from vtok_fast import nn as our_nn

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts" / "hub.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)

ALONE = """
import importlib.util, json, sys
sys.modules["vtok_fast"] = None  # it must not be needed
folder, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
import torch
x, w = torch.randn(1, 4, 3, 8, 8), torch.randn(6, 4, 3, 3, 3)
y = module.causal_conv3d(x, w)
padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
want = torch.nn.functional.conv3d(padded, w)
codes, indices = module.fsq_quantize(torch.randn(1, 3, 2, 4, 4), (8, 5, 5))
module.norm_act(x, torch.ones(4), kind="rms", activation="silu")
packed = module.pack_tokens(x, torch.rand(1, 3, 8, 8) > 0.5)
grad = torch.autograd.grad(module.causal_conv3d(x, w.requires_grad_()).sum(), w)[0]
q = torch.randn(1, 1, 6, 8)
module.scope_attention(q, q, q, module.Scope.block_causal(2, 3))
print(json.dumps({"error": ((y - want).norm() / want.norm()).item(), "gradient": grad.shape == w.shape,
                  "namespaces": [n for n in dir(torch.ops) if "vtok" in n],
                  "backends": module.available_backends()["causal_conv3d"],
                  "absolute": [n for n in sys.modules if n.split(".")[0] == "vtok_fast" and sys.modules[n] is not None]}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    natives = [Path(native.lib().__file__)] if native.lib() else []
    return folder, hub.write(folder, ["torch-cpu", hub.variant_here()], natives)


def test_every_import_is_relative(repository):
    folder, name = repository
    files = sorted(folder.glob("build/torch-cpu/**/*.py"))
    assert {"__init__.py", "layers.py", "dispatch/native.py", "ops/fsq.py", "kernels/norm_act.py"} <= {
        str(p.relative_to(folder / "build" / "torch-cpu")) for p in files}
    for path in files:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert all((n or "").split(".")[0] != "vtok_fast" for n in names), path
        assert "vtok_fast::" not in text.replace(f"{name}::", "") and "torch.ops.vtok_fast" not in text, path


@pytest.mark.parametrize("variant", ["torch-cpu", hub.variant_here()])
def test_it_works_without_the_package(repository, tmp_path, variant):
    folder, name = repository
    metadata = json.loads((folder / "build" / variant / "metadata.json").read_text())
    assert metadata["id"] == name and metadata["name"] == "vtok-fast"
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder / "build" / variant), "any_name"], capture_output=True,
                          text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["error"] < 1e-6 and found["gradient"] and found["namespaces"] == [name] and not found["absolute"]
    native_here = native.lib() is not None and variant != "torch-cpu"
    assert (found["backends"]["cpu"] is None) == native_here


def test_layers_have_no_state_and_our_forward(repository):
    """What `kernels` checks before it takes a layer; and beside the installed package, in one process."""
    folder, name = repository
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
            assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
        conv, x = our_nn.CausalConv3d(4, 6, 3), torch.randn(1, 4, 3, 8, 8)
        torch.testing.assert_close(module.layers.CausalConv3d.forward(conv, x), conv(x))
        norm = our_nn.NormAct(4, activation="silu")
        torch.testing.assert_close(module.layers.NormAct.forward(norm, x), norm(x))
    finally:
        for key in [k for k in sys.modules if k.split(".")[0] == name]:
            del sys.modules[key]


def test_another_version_has_another_name(tmp_path, monkeypatch):
    first = hub.write(tmp_path / "a", ["torch-cpu"], [])
    assert hub.write(tmp_path / "b", ["torch-cpu"], []) == first
    monkeypatch.setattr(hub, "ENTRY", hub.ENTRY + "# changed\n")
    assert hub.write(tmp_path / "b", ["torch-cpu"], []) != first


def test_the_command_writes_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub.py", str(tmp_path / "out")])
    hub.main()
    said, variants = capsys.readouterr().out, {path.name for path in (tmp_path / "out" / "build").iterdir()}
    assert variants == {"torch-cpu", "torch-cuda", hub.variant_here()} and all(name in said for name in variants)


def test_tuned_tables_come_along_where_the_dispatcher_looks(tmp_path, monkeypatch):
    plain = hub.write(tmp_path / "a", ["torch-cpu"], [])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "some_gpu.json").write_text("{}")
    monkeypatch.setattr(hub, "TABLES", tmp_path / "tables")
    assert hub.write(tmp_path / "a", ["torch-cpu"], []) != plain
    folder = tmp_path / "a" / "build" / "torch-cpu"
    assert (folder / "dispatch" / "tuning.py").is_file() and (folder / "dispatch" / tuning.SHIPPED.name / "some_gpu.json").is_file()


def test_kernels_loads_it(repository, tmp_path):
    """The real thing, where it is installed (in a folder of its own: the source's folder kernels has the same
    name)."""
    load = ("import sys, pathlib, torch, kernels; m = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend='cpu'); "
            "print(m.fsq_quantize(torch.zeros(1, 3, 1, 1, 1), (8, 5, 5)).indices.shape)")
    done = subprocess.run([sys.executable, "-c", load, str(repository[0])], capture_output=True, text=True, cwd=tmp_path)
    if "No module named 'kernels'" in done.stderr:
        pytest.skip("kernels is not installed")
    assert done.returncode == 0 and "[1, 1, 1, 1]" in done.stdout, done.stderr


def test_what_cannot_be_made_relative_is_refused():
    with pytest.raises(ValueError, match="line 1: write"):
        list(hub.imports(ast.parse("import vtok_fast.ops")))
