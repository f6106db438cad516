"""info and doctor in faked environments: GPUs against compiled architectures, versions known to be bad, what
is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import pytest
import torch

import vtok_fast
from vtok_fast.commands import info
from vtok_fast.dispatch import backends, native
from vtok_fast.installation import doctor, facts, gpus, known_bad, surroundings

ROOT = Path(__file__).resolve().parents[2]
H200 = {"name": "NVIDIA H200", "capability": [9, 0]}
A10 = {"name": "NVIDIA A10G", "capability": [8, 6]}
ADA = {"name": "NVIDIA L4", "capability": [8, 9]}
THOR = {"name": "NVIDIA Thor", "capability": [11, 0]}
TURING = {"name": "Tesla T4", "capability": [7, 5]}


def probed(**found):
    return (
        facts.NOTHING
        | {"torch": "2.11.0+cu130", "cuda": True, "cudnn": 91900, "threads": 8, "archs": ["80", "90a"]}
        | found
    )


# ---- GPUs and compiled architectures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "archs", "code"),
    [
        ((9, 0), ["80", "90a"], "sm_90a"),
        ((8, 9), ["80", "90a"], "sm_80"),
        ((8, 9), ["90a"], None),
        ((9, 0), ["80"], "compute_80"),
        ((9, 0), ["90"], "sm_90"),
        ((8, 6), ["80", "86", "89"], "sm_86"),
        ((8, 0), ["86"], None),
        ((8, 7), ["80", "86"], "sm_86"),
        ((12, 0), ["80", "90a"], "compute_80"),
        ((12, 0), ["100a", "120"], "sm_120"),
        ((12, 1), ["120"], "sm_120"),
        ((10, 3), ["100a"], "sm_100"),
        ((7, 5), ["80"], None),
        ((9, 0), [], None),
    ],
)
def test_which_code_a_gpu_runs(gpu, archs, code):
    assert gpus.code_for(gpu, archs) == code


def test_the_fit_in_words():
    assert gpus.fit((8, 9), ["90a", "80"]) == "built for 9.0a, 8.0; this GPU is 8.9: using sm80"
    assert (
        gpus.fit((8, 9), ["90a"])
        == "built for 9.0a; this GPU is 8.9: no kernel for it, using Triton and PyTorch"
    )
    assert gpus.fit((12, 0), ["80"]).endswith("using compute_80, compiled by the driver at first use")
    assert gpus.fit((9, 0), []).startswith("built without CUDA kernels")


@pytest.mark.parametrize(
    ("gpu", "archs", "level", "cure"),
    [
        (H200, ["80", "90a"], "ok", ""),
        (H200, ["90"], "hint", "cu130-sm90a vtok-fast==0.1.0+cu130.sm90a "),
        (H200, ["80", "89"], "hint", "VTOK_FAST_CUDA_ARCHS=90a pip install"),
        (ADA, ["90a"], "hint", "cu130-sm80-89 vtok-fast==0.1.0+cu130.sm80.sm89 "),
        (ADA, ["90a"], "hint", "VTOK_FAST_CUDA_ARCHS=89 pip install"),
        (ADA, ["80"], "ok", ""),
        (ADA, [], "hint", "cu130-sm80-89"),
        (THOR, ["100a", "120"], "hint", "VTOK_FAST_CUDA_ARCHS=110"),
        (THOR, ["90a"], "hint", "cu130-sm100a-120"),
        (TURING, ["80"], "hint", ""),
        (TURING, [], "hint", ""),
    ],
)
def test_the_doctor_on_gpus(monkeypatch, gpu, archs, level, cure):
    monkeypatch.setattr(facts, "version", lambda name: f"0.1.0+{gpus.label(archs)}".rstrip("+"))
    (finding,) = doctor._gpus(probed(gpus=[gpu], archs=archs))
    assert finding.level == level and gpu["name"] in finding.name
    assert cure in finding.cure and bool(cure) == bool(finding.cure)


def test_the_doctor_without_a_gpu_or_with_an_old_driver():
    assert doctor._gpus(probed())[0].level == "ok"
    (finding,) = doctor._gpus(probed(gpus=[H200], cuda_problem="CUDA driver version is insufficient"))
    assert finding.level == "bad" and "insufficient" in finding.text and "driver" in finding.cure
    assert not [f for f in doctor._gpus(probed(gpus=[H200], native="not built")) if "H200" in f.name]


def test_an_amd_gpu_is_not_judged_by_its_number():
    """Its compute capability is (9, 4), which says nothing of NVIDIA's architectures."""
    (finding,) = doctor._gpus(probed(gpus=[{"name": "MI300X", "capability": [9, 4]}], hip="7.1", archs=[]))
    assert finding.level == "ok" and not finding.cure and "GPUs of NVIDIA" in finding.text


@pytest.mark.parametrize(
    ("gpu", "family"),
    [
        ((8, 0), "sm80-89"),
        ((8, 6), "sm80-89"),
        ((8, 9), "sm80-89"),
        ((9, 0), "sm90a"),
        ((10, 0), "sm100a-120"),
        ((10, 3), "sm100a-120"),
        ((11, 0), "sm100a-120"),
        ((12, 1), "sm100a-120"),
        ((13, 0), "sm100a-120"),
        ((7, 5), None),
    ],
)
def test_each_gpu_has_a_family_with_its_own_code(gpu, family):
    assert gpus.family_for(gpu) == family
    line = gpus.install(gpu, [], "0.2.0")
    assert (f"--find-links cu130-{family} vtok-fast==0.2.0+cu130.sm" in line) if family else line == ""
    if family is not None:
        assert gpus.install(gpu, gpus.FAMILIES[family], "0.2.0").startswith("in the source folder, with nvcc")
        assert gpus.install(gpu, [], None).startswith("in the source folder, with nvcc")
        assert "cu128-sm" in gpus.install(gpu, ["75"], "0.2.0+cu128.sm75")


class Gpu:
    """A GPU and a native module that are not there."""

    def __init__(self, monkeypatch, capability, archs):
        self.module = types.SimpleNamespace(cuda_archs=archs, cuda_problem=lambda: "")
        monkeypatch.setattr(native, "_C", self.module)
        monkeypatch.setattr(native, "_missing", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(gpus, "installed_version", lambda: f"0.1.0+{gpus.label(archs)}".rstrip("+"))


@pytest.fixture
def forgetful():
    native._why_no_gpu.cache_clear()
    yield
    native._why_no_gpu.cache_clear()
    backends._fallbacks.pop(("some_op", "sm80"), None)


@pytest.mark.parametrize(
    ("archs", "said"),
    [
        (["90a"], "built for 9.0a; this GPU is 8.9: no kernel for it, using Triton and PyTorch"),
        ([], "built without CUDA kernels; this GPU is 8.9: using Triton and PyTorch"),
    ],
)
def test_no_kernel_for_this_gpu_is_one_warning_and_a_fallback(monkeypatch, forgetful, archs, said):
    """Never "no kernel image is available": the call goes to the next backend."""
    fake = Gpu(monkeypatch, (8, 9), archs)
    with pytest.warns(UserWarning) as seen:
        reasons = [native.why_no_cuda() for _ in range(3)]
    assert len(seen) == 1 and len(set(reasons)) == 1 and reasons[0] == f"the native module is {said}"
    line = "pip install --find-links cu130-sm80-89 vtok-fast==0.1.0+cu130.sm80.sm89"
    build = "in the source folder, with nvcc: VTOK_FAST_CUDA_ARCHS=89 pip install ."
    assert str(seen[0].message) == f"vtok_fast: {reasons[0]}. To have them: {line}   or, {build}"
    ran = []
    monkeypatch.setitem(
        backends._ops,
        "some_op",
        (
            backends.Backend("sm80", lambda call: native.why_no_cuda(), lambda call: ran.append("sm80")),
            backends.Backend("reference", lambda call: None, lambda call: ran.append("reference")),
        ),
    )
    backends.select("some_op", None).run(None)
    assert ran == ["reference"] and backends.fallbacks()["some_op"]["sm80"] == reasons[0]
    native._why_no_gpu.cache_clear()
    fake.module.cuda_archs = ["80", "90a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.why_no_cuda() is None


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((9, 4), "7.1")])
def test_a_gpu_that_no_build_serves_is_not_warned_about(monkeypatch, forgetful, capability, hip):
    Gpu(monkeypatch, capability, [])
    monkeypatch.setattr(torch.version, "hip", hip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.why_no_cuda() is not None


# ---- versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "sources"),
    [
        ("2.8.0+cu128", 91002, {163539, 167024}),
        ("2.7.1+cu126", 90501, set()),
        ("2.8.0", 90800, {163539}),
        ("2.8.0", 91300, {167024, 166643}),
        ("2.9.0+cu128", 91002, {166643, 167024}),
        ("2.9.0", 91600, {166643}),
        ("2.9.1+cu128", 91002, {166643}),
        ("2.9.1", 91501, set()),
        ("2.10.0+cu130", 91501, set()),
        ("2.13.0+cu130", 92000, set()),
        ("2.13.0+cu130", 92301, {188288}),
        ("2.14.1+cu130", 92301, {188288}),
        ("2.14.1+cu130", 92400, set()),
        ("2.14.1+cu130", 92801, set()),
        ("2.10.0a0+gitabc", 91400, {166643}),
    ],
)
def test_known_bad_pairs(torch_version, cudnn, sources):
    found = doctor._pairs(probed(torch=torch_version, cudnn=cudnn, allow_tf32=True, gpus=[H200, A10]))
    assert {int(f.text.rpartition("#")[2].rstrip(")")) for f in found} == sources
    assert all(f.cure and f.level in ("bad", "hint") for f in found)


def test_what_gives_wrong_results_is_bad_and_what_is_not_used_does_not_matter():
    levels = {
        f.text.rpartition("#")[2].rstrip(")"): f.level
        for f in doctor._pairs(probed(torch="2.8.0", cudnn=91002, allow_tf32=True))
    }
    assert levels == {"163539": "bad", "167024": "bad"}
    assert len(doctor._pairs(probed(torch="2.8.0", cudnn=91002, allow_tf32=False))) == 1
    assert not doctor._pairs(probed(torch="2.14.1", cudnn=92301, gpus=[H200]))  # only GPUs of 8.6
    assert not doctor._pairs(probed(torch="2.9.0", cudnn=None, cuda=False))


@pytest.mark.parametrize(
    ("torch_version", "cuda", "package", "installed", "sources"),
    [
        ("2.10.0", True, "flash-attn-4", "4.0.0b1", {188322}),
        ("2.13.0+cu130", True, "flash-attn-4", "4.0.0", {188322}),
        ("2.14.0", True, "flash-attn-4", "4.0.0", set()),
        ("2.9.1", True, "flash-attn-4", "4.0.0", set()),
        ("2.13.0", True, "flash-attn-4", None, set()),
        ("2.13.0", False, "flash-attn-4", "4.0.0", set()),
        ("2.13.0", False, "vector-quantize-pytorch", "1.14.3", {114}),
        ("2.13.0", True, "vector-quantize-pytorch", "1.14.4", set()),
        ("2.13.0", False, "vector-quantize-pytorch", "1.32.0", set()),
        ("2.13.0", True, "triton", "3.7.1", {193183}),
        ("2.13.0", False, "triton", "3.7.1", set()),
        ("2.14.1", True, "triton", "3.8.0", set()),
        ("2.14.1", True, "triton", "3.9.0", set()),
        ("2.13.0", True, "triton", "3.6.0", set()),
        ("2.13.0", False, "diffusers", "0.35.2", {12753}),
        ("2.13.0", True, "diffusers", "0.36.0", set()),
        ("2.14.1", True, "diffusers", "0.42.1", set()),
    ],
)
def test_packages_that_are_known_to_be_bad(monkeypatch, torch_version, cuda, package, installed, sources):
    said = json.dumps({"torch": torch_version, "cuda": cuda, "cudnn": 92000 if cuda else None})
    monkeypatch.setattr(facts.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))
    monkeypatch.setattr(facts, "version", lambda name: installed if name == package else None)
    found = doctor._pairs(facts.look()[0])
    assert {int(f.text.rpartition("#")[2].rstrip(")")) for f in found} == sources
    assert all(f"{package} {installed}" in f.text and f.cure for f in found)


@pytest.mark.parametrize(
    ("capability", "triton", "found"),
    [((10, 0), "3.8.0", True), ((10, 3), "3.6.0", True), ((10, 3), "3.9.0", False), ((12, 0), "3.8.0", False),
     ((9, 0), "3.8.0", False), ((10, 0), "3.5.1", False)],
)  # fmt: skip
def test_a_pair_that_needs_a_gpu_of_a_major_version(capability, triton, found):
    gpu = {"name": "a GPU", "capability": list(capability)}
    said = doctor._pairs(probed(torch="2.14.1", cudnn=92801, gpus=[gpu], packages={"triton": triton}))
    assert [f.text.rpartition("(")[2].rstrip(")") for f in said] == ["triton#10821"] * found


def test_every_pair_has_a_public_source():
    places = {"pytorch", "triton", "diffusers", "vector-quantize-pytorch"}
    for pair in known_bad.PAIRS:
        place, _, number = pair.source.partition("#")
        assert place in places and number.isdigit() and f"``{place}``" in known_bad.__doc__, pair


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.9.1+cu128", (2, 9, 1)),
        ("2.13.0a0+git1", (2, 13, 0)),
        ("2.10", (2, 10)),
        (91002, (9, 10, 2)),
        (8907, (8, 9, 7)),
        (None, None),
    ],
)
def test_versions(text, version):
    assert known_bad.version(text) == version


@pytest.mark.parametrize(
    ("wanted", "here", "level"),
    [
        ("==3.6.0", "3.6.0", "ok"),
        ("==3.6.0", "3.5.1", "hint"),
        ("~=3.8.0", "3.8.0", "ok"),
        ("~=3.8.0", "3.8.2", "ok"),
        ("~=3.8.0", "3.9.0", "hint"),
        ("~=3.8.1", "3.8.0", "hint"),
        ("~=3.8", "3.9.0", "ok"),
        (None, "3.6.0", "ok"),
        ("==3.6.0", None, "hint"),
    ],
)
@pytest.mark.parametrize("line", ['triton{}; platform_system == "Linux"', "triton ({}) ; extra == 'x'"])
def test_triton_is_the_one_of_torch(monkeypatch, wanted, here, level, line):
    """torch up to 2.13 asks for one Triton, from 2.14 on for any of a minor version."""
    requires = ["numpy", "triton-windows==1.0"] + ([line.format(wanted)] if wanted else [])
    monkeypatch.setattr(facts, "version", lambda name: here)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requires)
    (finding,) = doctor._triton(probed())
    assert finding.level == level and (level == "ok" or "pip install" in finding.cure)
    assert level == "ok" or here is None or finding.cure == f"pip install 'triton{wanted}'"
    assert doctor._triton(probed(cuda=False)) == []


# ---- what is missing ---------------------------------------------------------------------------------------


def test_a_missing_compiler_and_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert surroundings.compiler().level == "hint" and "g++" in surroundings.compiler().cure
    assert surroundings.nvcc(probed(gpus=[H200]))[0].level == "hint" and surroundings.nvcc(probed()) == []
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert surroundings.nvcc(probed(gpus=[H200]))[0].level == "ok"


def test_two_openmp_runtimes_are_named():
    finding = doctor._openmp(probed(openmp=["/a/libgomp.so.1", "/b/libiomp5.so"]))
    assert (
        finding.level == "hint"
        and "2 runtimes" in finding.text
        and "/b/libiomp5.so" in finding.text
        and finding.cure
    )


def without(module: str, folder: Path) -> dict[str, str]:
    """An environment in which a module cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_info_without_torch(tmp_path):
    environment = without("torch", tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "vtok_fast.commands.info"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and not result.stderr
    assert "causal_conv3d.sm80            unavailable: torch cannot be imported" in result.stdout
    assert f"vtok fast                     {vtok_fast.__version__}" in result.stdout
    result = subprocess.run(
        [sys.executable, "-m", "vtok_fast.cli", "info", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    told = json.loads(result.stdout)
    assert set(told["ops"]) == set(info.BACKENDS) and all(
        why for op in told["ops"].values() for why in op.values()
    )
    if native.lib() is not None:  # it takes no torch
        assert told["native_module"] == "built" and told["cuda_archs"] == list(native.lib().cuda_archs)
        assert told["supported_isas"] == list(native.lib().supported_isas())


def test_the_doctor_without_torch_knows_the_native_module_and_the_gpus(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9'; echo 'Odd, [N/A]'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(facts, "look", lambda: (None, "No module named 'torch'"))
    alone = facts.without_torch()
    assert alone["gpus"] == [{"name": "NVIDIA L4", "capability": [8, 9]}]
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["torch"].level == "bad" and findings["torch"].cure == "pip install 'torch>=2.6'"
    assert findings["native module"].level == ("ok" if native.lib() is not None else "bad")
    assert "GPU 0, NVIDIA L4" in findings or native.lib() is None
    monkeypatch.setattr(facts, "PACKAGE", tmp_path)
    assert facts.without_torch()["native"] == "the native module is not built"
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no module")
    assert "cannot be loaded" in facts.without_torch()["native"]


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no such signal")
@pytest.mark.volatile
def test_a_reader_that_has_enough_ends_info_quietly(tmp_path):
    command = f"{sys.executable} -m vtok_fast.commands.info | true"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=without("torch", tmp_path)
    )
    assert result.stderr == ""


def test_info_without_the_native_module(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "vtok_fast.commands.info"],
        capture_output=True,
        text=True,
        env=without("vtok_fast._C", tmp_path),
    )
    assert (
        result.returncode == 0
        and "native module                 the native module is not built" in result.stdout
    )
    assert "fsq.reference                 available" in result.stdout
    assert "fsq.cpu                       unavailable" in result.stdout


def test_a_native_module_that_kills_python_is_a_finding(monkeypatch):
    said = json.dumps({"torch": "2.11.0", "cuda": False, "threads": 2}) + "\n"
    monkeypatch.setattr(
        facts.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -11, said, "")
    )
    probe, failure = facts.look()
    assert not failure and "status -11" in probe["native"]
    assert doctor._native(probe).level == "bad"
    assert all(
        "vtok_fast cannot be imported" in why for op in info.facts()["ops"].values() for why in op.values()
    )


def test_info_on_a_gpu_machine(monkeypatch):
    found = probed(
        gpus=[ADA],
        archs=["80", "90a"],
        version="0.1.0",
        ops={"fsq": {"sm80": None, "cpu": "the tensors are on cuda"}},
    )
    monkeypatch.setattr(facts, "look", lambda: (found, ""))
    said = []
    info.main(said.append)
    text = "\n".join(said)
    assert "NVIDIA L4: built for 8.0, 9.0a; this GPU is 8.9: using sm80" in text
    assert (
        "fsq.sm80                      available" in text
        and "fsq.cpu                       unavailable: the tensors" in text
    )


def test_the_listed_backends_are_those_that_exist():
    registered = {op: [b.name for b in candidates] for op, candidates in backends._ops.items()}
    assert set(registered) == set(info.BACKENDS)
    for op, names in registered.items():
        assert [name for name in info.BACKENDS[op] if name in names] == names, op
