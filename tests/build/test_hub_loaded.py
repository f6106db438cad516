"""A kernel repository in a process of its own: without the package, beside it and other builds, and loaded by
Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.kernel_repository import ROOT, hub, write_repository

from vtok_fast.dispatch import native

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
                  "absolute": [n for n, m in sys.modules.items() if n.split(".")[0] == "vtok_fast" and m]}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "repository")


@pytest.mark.parametrize("variant", ["torch-cpu", hub.variant_here()])
def test_it_works_without_the_package(repository, tmp_path, variant):
    folder, ids = repository
    name = ids[variant]
    metadata = json.loads((folder / "build" / variant / "metadata.json").read_text())
    assert metadata["id"] == name and metadata["name"] == "vtok-fast" and metadata["version"] == 1
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder / "build" / variant), "any_name"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["error"] < 1e-6
        and found["gradient"]
        and found["namespaces"] == [name]
        and not found["absolute"]
    )
    native_here = native.lib() is not None and variant != "torch-cpu"
    assert (found["backends"]["cpu"] is None) == native_here


def test_a_build_without_a_module_for_this_python_says_so(tmp_path):
    """Instead of running every op on its reference in silence; the portable variants never had one."""
    other = tmp_path / "_C.cpython-39-x86_64-linux-gnu.so"
    other.write_text("")
    hub.write(tmp_path / "out", ["torch-cpu", hub.variant_here()], [other])
    for variant, warned in (("torch-cpu", False), (hub.variant_here(), True)):
        done = subprocess.run(
            [sys.executable, "-c", ALONE, str(tmp_path / "out/build" / variant), "any_name"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        said = f"native modules loads in {sys.implementation.cache_tag}: {other.name}; the ops run on"
        assert (said in done.stderr) == warned and done.stderr.count("RuntimeWarning") == warned, done.stderr


# Several builds and the installed package in one process: which code, ops and native module each has.
TOGETHER = """
import importlib.util, json, pathlib, sys
import torch, vtok_fast
from vtok_fast.dispatch import native
facts = {}
for name, folder in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    x = torch.randn(1, 3, 2, 4, 4)
    with torch.profiler.profile() as seen:
        got = module.fsq_quantize(x.clone().requires_grad_(), (8, 5, 5))
    assert torch.equal(got.indices, vtok_fast.fsq_quantize(x, (8, 5, 5)).indices)
    facts[f"{name} {folder}"] = {
        "layers": str(pathlib.Path(module.layers.__file__).parent),
        "code": module.fsq_quantize.__code__.co_filename,
        "cpu": module.available_backends()["fsq"]["cpu"],
        "ops": sorted({e.key.split("::")[0] for e in seen.key_averages() if e.key.startswith("_vtok")})}
installed = vtok_fast.fsq_quantize.__code__.co_filename
print(json.dumps({"facts": facts, "native": native.lib() is not None, "installed": installed}))
"""


def together(tmp_path, builds):
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps(builds)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("names", ["id", "other names", "one name"])
def test_builds_in_one_process_keep_apart(repository, tmp_path, names):
    """Under their ids, as kernels imports them, under other names, and under one name that is taken again."""
    folder, ids = repository
    given = {
        "id": ids.values(),
        "other names": map("name_{}".format, range(len(ids))),
        "one name": ["one"] * len(ids),
    }
    builds = [(name, str(folder / "build" / v)) for name, v in zip(given[names], ids, strict=True)]
    found = together(tmp_path, builds)
    for (name, path), (variant, own) in zip(builds, ids.items(), strict=True):
        facts = found["facts"][f"{name} {path}"]
        assert facts["layers"] == path and facts["code"].startswith(path) and facts["ops"] == [own]
        assert (facts["cpu"] is None) == (found["native"] and variant == hub.variant_here())
    assert found["installed"].startswith(str(ROOT))


def test_one_build_under_two_names_and_from_two_folders(repository, tmp_path):
    """torch knows an op's name once per process: the second import shares the first one's code."""
    folder, ids = repository
    shutil.copytree(folder / "build" / "torch-cpu", tmp_path / "another_place")
    first = str(folder / "build" / "torch-cpu")
    builds = [("one", first), ("two", first), ("three", str(tmp_path / "another_place"))]
    found = together(tmp_path, builds)["facts"]
    assert len(found) == 3 and all(
        facts["layers"] == first and facts["ops"] == [ids["torch-cpu"]] for facts in found.values()
    )


def with_kernels(code: str, tmp_path: Path, *words: str, **variables: str) -> str:
    """What a program prints that imports the real package (in a folder of its own: the source's folder
    kernels has the same name)."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kernels is not installed")
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO_VARIANTS = """
import json, pathlib, sys
from kernels import get_loaded_kernels, get_local_kernel
folder = pathlib.Path(sys.argv[1])
a = get_local_kernel(folder / "build" / "torch-cpu", backend="cpu")
b = get_local_kernel(folder)
assert a.fsq_quantize is not b.fsq_quantize
print(json.dumps([[k.metadata.id, k.module.layers.__file__, k.module.available_backends()["fsq"]["cpu"]]
                  for k in get_loaded_kernels()]))
"""


def test_kernels_loads_two_variants_that_keep_apart(repository, tmp_path):
    """The variant of this torch is preferred where it fits; a variant's own folder can be given, too."""
    folder, ids = repository
    loaded = json.loads(with_kernels(TWO_VARIANTS, tmp_path, str(folder)))
    assert [row[0] for row in loaded] == [ids["torch-cpu"], ids[hub.variant_here()]]
    assert [row[1] for row in loaded] == [
        str(folder / "build" / v / "layers.py") for v in ("torch-cpu", hub.variant_here())
    ]
    assert loaded[0][2] is not None and (loaded[1][2] is None) == (native.lib() is not None)


ON_ROCM = """
import json, pathlib, sys, torch
torch.version.hip = "7.1.25424"
from kernels import get_loaded_kernels, get_local_kernel
vtok = get_local_kernel(pathlib.Path(sys.argv[1]))
(kernel,) = get_loaded_kernels()
print(json.dumps([kernel.metadata.id, str(kernel.metadata.backend.backend_type), vtok.layers.__file__]))
"""


def test_kernels_takes_the_variant_for_rocm_where_torch_is_one(repository, tmp_path):
    """As far as that goes without such a GPU: torch says that it was built for ROCm."""
    folder, ids = repository
    name, backend, file = json.loads(with_kernels(ON_ROCM, tmp_path, str(folder)))
    assert name == ids["torch-rocm"] and "rocm" in backend.lower()
    assert file == str(folder / "build" / "torch-rocm" / "layers.py")


@pytest.mark.parametrize("text", ["README.md", "wheels.md"])
def test_the_lines_for_get_kernel_work(repository, tmp_path, text):
    """Those of the documentation and of the repository's card, with a cache laid out as the Hub's client
    does."""
    page = (repository[0] / "README.md" if text == "README.md" else ROOT / "docs" / "wheels.md").read_text()
    (lines,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "get_kernel" in code)
    commit = "0" * 40
    cache = tmp_path / "cache" / "kernels--you--vtok-fast"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v1").write_text(commit)
    (cache / "snapshots").mkdir()
    shutil.copytree(repository[0], cache / "snapshots" / commit)
    code = lines + "print(vtok.layers.__file__)"
    said = with_kernels(
        code, tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"), KERNELS_CACHE=str(tmp_path / "cache")
    )
    assert said.split()[-1] == str(cache / "snapshots" / commit / "build" / hub.variant_here() / "layers.py")
