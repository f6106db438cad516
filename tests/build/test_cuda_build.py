"""The CUDA sources compile for each architecture, no kernel spills registers or uses local memory, and the
build picks its GPUs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import vtok_fast
from vtok_fast.dispatch import native

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_usage"
CONFORMANCE = ROOT / "tests" / "emulator" / "conformance.cu"
CONFORMANCE_SM90 = CONFORMANCE.with_name("conformance_sm90.cu")
ONLY_SM90 = [*sorted(FOLDER.rglob("sm90_*.cu")), CONFORMANCE_SM90, CONFORMANCE.with_name("conformance_sm90_more.cu")]
SOURCES = [*sorted(set(FOLDER.rglob("*.cu")) - set(ONLY_SM90)), CONFORMANCE]


def tool(name: str) -> str | None:
    """nvcc and its companions: of a toolkit, or of the Triton wheel, which has some."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        homes.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(homes))


NVCC, CUOBJDUMP, CMAKE = tool("nvcc"), tool("cuobjdump"), shutil.which("cmake")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
needs_sass = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="there is no nvcc and cuobjdump")


class Usage(NamedTuple):
    kernel: str
    stack: int  # bytes of local memory per thread, spills among them
    spills: int
    registers: int


def cached(name: str, *content: bytes | str) -> Path:
    """A place for what follows from these contents."""
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"\0".join(c if isinstance(c, bytes) else c.encode() for c in content)).hexdigest()[:20]
    return CACHE / f"{name}.{digest}"


def compiled(source: Path, arch: str) -> tuple[Path, str]:
    """The cubin of a source, and what ptxas said; kept until a source or the compiler changes."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    headers = sorted((*FOLDER.rglob("*.*h"), *FOLDER.parent.glob("*.h")))
    cubin = cached(f"{source.stem}.{arch}.cubin", version, arch, *(p.read_bytes() for p in (source, *headers)))
    said = cubin.with_name(cubin.name + ".txt")
    if not said.exists():
        command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v", source, "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{source.name} for {arch}:\n{result.stderr[-6000:]}"
        assert "warning" not in result.stderr, result.stderr
        said.write_text(result.stderr)
    return cubin, said.read_text()


def usages(said: str) -> list[Usage]:
    pattern = (r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
               r".*?Used (\d+) registers")
    return [Usage(name, int(stack), int(stores) + int(loads), int(registers))
            for name, stack, stores, loads, registers in re.findall(pattern, said, re.DOTALL)]


def check(source: Path, arch: str) -> None:
    found = usages(compiled(source, arch)[1])
    kernels = len(re.findall(r"__global__", source.read_text()))
    assert len(found) >= kernels, f"{source.name}: {len(found)} kernels in what ptxas said, {kernels} in the source"
    for usage in found:
        print(f"{source.stem} {arch} {usage.registers:4} registers  {usage.kernel}")
    bad = [usage for usage in found if usage.stack or usage.spills]
    assert not bad, f"{source.name} for {arch}: local memory in " + "; ".join(map(str, bad))


def name(path: Path) -> str:
    return path.stem


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_sm80(source):
    check(source, "sm_80")


@needs_nvcc
@pytest.mark.parametrize("source", [pytest.param(source, marks=pytest.mark.slow if "_f16_" in source.name or "e4m3_" in source.name else (), id=name(source))
                                    for source in ONLY_SM90])
def test_sm90a(source):
    check(source, "sm_90a")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ("sm_90", "sm_100a", "sm_120"))
@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_newer_architectures(source, arch):
    check(source, arch)


@needs_nvcc
def test_local_memory_would_be_found(tmp_path):
    source = tmp_path / "indexed.cu"
    source.write_text("""__global__ void indexed(float* x, int n) {
      float a[64];
      for (int i = 0; i < 64; ++i) a[(i * n) % 64] = x[i];
      for (int i = 0; i < 64; ++i) x[i] = a[(i + n) % 64];
    }
    """)
    with pytest.raises(AssertionError, match="local memory in Usage.*indexed"):
        check(source, "sm_80")


@needs_nvcc
@pytest.mark.slow
def test_two_compilations_have_the_same_bytes(tmp_path):
    """With the option that CMakeLists.txt gives; without it, a symbol is called after the process."""
    option = "--objdir-as-tempdir"
    assert option in (ROOT / "CMakeLists.txt").read_text()
    source = tmp_path / "twice.cu"
    source.write_text("namespace { template <class T> __global__ void twice(T* x) { *x *= 2; } }\n"
                      "void call(float* x) { twice<<<1, 1>>>(x); }\n")
    for given, times in (((option,), 1), ((), 2)):
        made = set()
        for _ in range(2):
            subprocess.run([NVCC, "-std=c++17", "-arch=sm_80", *given, "-c", source, "-o", tmp_path / "twice.o"], check=True)
            made.add((tmp_path / "twice.o").read_bytes())
        assert len(made) == times, given


@needs_sass
def test_fsq_moves_16_bytes_at_a_time():
    """Of the launches with addresses that allow it: planar kernels by LDG, rows by asynchronous copies, both
    back by STG."""
    wanted = {"fsq/fsq.cu": {"quantize_planar": ("LDG.E.128", "STG.E.128"), "quantize_rows": ("LDGSTS.E.BYPASS.128", "STG.E.128")},
              "fsq/fsq_backward.cu": {"backward_dense": ("LDG.E.128", "STG.E.128")}}
    for source, kernels in ((FOLDER / file, kernels) for file, kernels in wanted.items()):
        sass = subprocess.run([CUOBJDUMP, "-sass", compiled(source, "sm_80")[0]], capture_output=True, text=True, check=True).stdout
        functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
        for kernel, instructions in kernels.items():
            bodies = [body for function, body in functions.items() if kernel in function]
            assert bodies and all(word in body for body in bodies for word in instructions), kernel


@needs_sass
def test_sm90a_has_its_own_instructions():
    cubin = compiled(CONFORMANCE_SM90, "sm_90a")[0]
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    wanted = ("HGMMA.64x64x16.F32.BF16", "HGMMA.64x128x16.F32.BF16", "UTMALDG.3D", "UTMALDG.3D.MULTICAST", "UTMASTG.3D",
              "UCGABAR_ARV", "STSM.16.M88.4", "STSM.16.MT88.4", "SYNCS.PHASECHK")
    assert not [word for word in wanted if word not in sass]


@needs_sass
def test_hopper_wgrad_multiplies_by_wgmma_what_tma_brings():
    """The loop over slices has its products in a row: no fence of all memory among them, and at most 16
    instructions for each."""
    cubin, said = compiled(FOLDER / "causal_conv3d" / "sm90_wgrad.cu", "sm_90a")
    assert "C75" not in said, said  # wgmma serialized, or more waits put in by the compiler
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
    kernels = [body for name, body in functions.items() if "wgrad_sm90_kernel" in name]
    assert len(kernels) == 8
    for body in kernels:
        assert "UTMALDG.5D" in body and "UTMALDG.5D.MULTICAST" in body and "USETMAXREG" in body
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
        jumps = [(int(target, 16), int(at, 16)) for at, text in lines
                 for target in re.findall(r"BRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", text)]
        loops = [[text for at, text in lines if begin <= int(at, 16) <= end] for begin, end in jumps if begin < end]
        loops = [loop for loop in loops if sum("HGMMA" in text for text in loop) >= 4 and len(loop) < 400]
        assert len(loops) >= 2  # with and without the bias
        for loop in loops:
            assert not any("MEMBAR" in text for text in loop)
            assert len(loop) <= 40 + 16 * sum("HGMMA" in text for text in loop)


@needs_sass
@pytest.mark.parametrize("dtype", ("bf16", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ("f16", "e4m3_bf16", "e4m3_f16"))))
def test_hopper_convolution_multiplies_by_wgmma_what_tma_brings(dtype):
    """The loop over taps: its products are not serialized, no fence of all memory stands in it, and of every
    21 instructions at least one is a product of 64 x N x 16, so that they need fewer issue slots than the
    products need time."""
    cubin, said = compiled(FOLDER / "causal_conv3d" / f"sm90_{dtype}.cu", "sm_90a")
    assert "C75" not in said, said  # wgmma serialized, setmaxnreg ignored
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
    kernels = {tuple(map(int, re.findall(r"Li(\d+)E", name))): body for name, body in functions.items()
               if "conv_sm90_kernel" in name}
    assert len(kernels) == 8
    product = "QGMMA.64x{}x32" if "e4m3" in dtype else "HGMMA.64x{}x16"
    wanted = ("UTMALDG.5D", "UTMALDG.3D ", "UTMALDG.3D.MULTICAST", "UTMASTG.5D", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC",
              "STSM.16.M88.4")
    for (rows, columns), body in kernels.items():
        assert not [word for word in wanted if word not in body] and not re.search(r"\b(LDL|STL)\b", body)
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
        jumps = [(int(target, 16), int(at, 16)) for at, text in lines
                 for target in re.findall(r"BRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", text)]
        loops = [[text for at, text in lines if begin <= int(at, 16) <= end] for begin, end in jumps if begin < end]
        # Four steps of 32 bytes of channels: of one tap on two blocks of 64 rows, or of two taps on one.
        whole = min((loop for loop in loops if sum(product.format(columns) in text for text in loop) == 8), key=len)
        assert sum("LDSM.16.M88.4" in text for text in whole) == 8
        # Waits for the group before the last, except where the registers leave room for one.
        waits = [text.split()[-1] for text in whole if "WARPGROUP.DEPBAR.LE" in text]
        assert waits == (["0x0", "0x0"] if (rows, columns) == (256, 160) else ["0x1", "0x1"]), (rows, columns)
        assert not any("MEMBAR" in text or "CCTL" in text for text in whole)
        cycles = 2 * 8 * columns // 2  # of the tensor cores, for both warpgroups
        print(f"{dtype} {rows}x{columns}: {len(whole)} instructions, 8 products, {2 * len(whole) / cycles:.2f} of the issue slots")
        assert len(whole) <= 8 * 21


@needs_sass
@pytest.mark.parametrize("source, name", (("sm90_bf16", "conv_sm90_kernel"), ("sm90_wgrad", "wgrad_sm90_kernel"),
                                          pytest.param("sm90_e4m3_bf16", "conv_sm90_kernel", marks=pytest.mark.slow)))
def test_registers_that_warpgroups_hand_over_exist(source, name):
    """What the producers give up and the others take, of what the compiler gave each: else setmaxnreg waits
    for ever."""
    cubin, said = compiled(FOLDER / "causal_conv3d" / f"{source}.cu", "sm_90a")
    given = {usage.kernel: usage.registers for usage in usages(said) if name in usage.kernel}
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
    assert len(given) == 8
    for kernel, registers in given.items():
        fewer, more = ({int(n, 16) for n in re.findall(rf"USETMAXREG\.{word}\S*\s+(?:UP\d+,\s*)?(0x[0-9a-f]+)", functions[kernel])}
                       for word in ("DEALLOC", "TRY_ALLOC"))
        assert len(fewer) == len(more) == 1 and registers == 168
        assert max(fewer) <= registers <= min(more) and 128 * max(fewer) + 256 * max(more) <= 384 * registers


# ---- which GPUs a build is for -----------------------------------------------------------------------------


def configure(tmp_path: Path, wish: str, gpus: str | None = None, torch_list: str | None = None,
              release: str = "13.0") -> tuple[int, str]:
    """csrc/cuda/archs.cmake on a machine with an nvcc and with these GPUs: its status, and what it set and
    said."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for program, text in {"nvcc": f"echo release {release}, V", "nvidia-smi": "exit 9" if gpus is None else f"printf '{gpus}'"}.items():
        (folder / program).write_text(f"#!/bin/sh\n{text}\n")
        (folder / program).chmod(0o755)
    script = tmp_path / "script.cmake"
    script.write_text(f"include({FOLDER / 'archs.cmake'})\nmessage(STATUS \"archs=${{CUDA_ARCHS}} code=${{CUDA_CODE}}.\")\n")
    command = [CMAKE, f"-DVTOK_FAST_CUDA_ARCHS={wish}", "-P", script]
    environment = {"PATH": str(folder)} | ({} if torch_list is None else {"TORCH_CUDA_ARCH_LIST": torch_list})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("wish, gpus, archs, code", (
    ("80;90a", None, "80;90a", "80-real;90-real;80-virtual"), ("90a,80", None, "90a;80", "90-real;80-real;80-virtual"),
    ("90a", None, "90a", "90-real;90-virtual"), ("100a;120", None, "100a;120", "100-real;120-real;100-virtual"),
    ("none", "9.0", "", ""),
    ("native", "9.0\\n9.0\\n", "90a", "90-real;90-virtual"), ("", "9.0", "90a", "90-real;90-virtual"),
    ("", "8.6\\n12.0\\n", "86;120", "86-real;120-real;86-virtual"), ("", "7.5", "", ""), ("", None, "", "")))
def test_choice_of_gpus(tmp_path, wish, gpus, archs, code):
    status, said = configure(tmp_path, wish, gpus)
    assert status == 0 and f"archs={archs} code={code}." in said


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("torch_list, wish, archs", (
    ("8.0;9.0+PTX", "", "80;90a"), ("7.0 7.5 8.6", "", "86"), ("Hopper", "", "90a"), ("Ampere;Ada;8.0", "", "80;86;89"),
    ("Ampere+Tegra Ada+PTX", "", "87;89"), ("Blackwell+Tegra", "", "110"), ("Blackwell", "", "100;120"),
    ("Common", "", "80;86;89;90a;100;120"), ("All", "", "80;86;89;90a;100;120"), ("Volta+Tegra;8.0", "", "80"),
    ("10.0a 12.0", "", "100a;120"), ("10.0f", "", "100f"), ("9.0a", "", "90a"), ("7.5", "", ""), ("Volta", "", ""),
    ("8.0", "90a", "90a"), ("8.0", "none", ""), ("8.0", "native", "89"), ("", "", "89")))
def test_the_list_of_pytorch(tmp_path, torch_list, wish, archs):
    """It chooses where our own variable does not; what is older than Ampere is left out."""
    status, said = configure(tmp_path, wish, "8.9", torch_list)
    assert status == 0 and f"archs={archs} code=" in said


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
def test_a_wrong_list_of_pytorch(tmp_path):
    status, said = configure(tmp_path, "", None, "8.0;hopper")
    assert status != 0 and "TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0;9.0+PTX, got hopper" in said


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("arch", ("8.0a", "8.9a", "8.6f", "9.0f"))
def test_a_suffix_that_no_gpu_has(tmp_path, arch):
    for wish, torch_list, variable in (("", f"8.0;{arch}", "TORCH_CUDA_ARCH_LIST"), (arch.replace(".", ""), None, "VTOK_FAST_CUDA_ARCHS")):
        status, said = configure(tmp_path, wish, None, torch_list)
        assert status != 0 and f"{variable}: no GPU is called {arch if torch_list else wish}" in " ".join(said.split())


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
def test_the_toolkit_must_know_sm90a(tmp_path):
    """By name it is an error; what was found here is built without those kernels, with a warning."""
    status, said = configure(tmp_path, "80;90a", release="12.6")
    said = " ".join(said.split())
    assert status != 0 and re.search(r"VTOK_FAST_CUDA_ARCHS: the sm_90a kernels need CUDA 12.8 or newer, and \S+nvcc is of CUDA 12.6;"
                                     " 90 instead of 90a builds without them", said)
    for torch_list, gpus in ((None, "9.0"), ("9.0", None)):
        status, said = configure(tmp_path, "", gpus, torch_list, release="12.6")
        assert status == 0 and "archs=90 code=90-real;90-virtual." in said and "need CUDA 12.8" in " ".join(said.split())
    status, said = configure(tmp_path, "80;90a", release="12.8")
    assert status == 0 and "archs=80;90a " in said


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("wish, message", (("native", "VTOK_FAST_CUDA_ARCHS=native: no GPU answers"),
                                           ("75", "need 80 .Ampere. or newer, got 75"), ("ampere", "got ampere")))
def test_impossible_choice_of_gpus(tmp_path, wish, message):
    status, said = configure(tmp_path, wish)
    assert status != 0 and re.search(message, said)


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
def test_an_unset_choice_says_why_there_is_no_cuda(tmp_path):
    status, said = configure(tmp_path, "")
    assert status == 0 and "building a CPU-only module: no GPU answers" in said


def version(tmp_path: Path, wish: str) -> subprocess.CompletedProcess:
    """What setup.py calls a wheel, where there is an nvcc 13.0."""
    pytest.importorskip("setuptools")
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = os.environ | {"VTOK_FAST_CUDA_ARCHS": wish, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("wish, said", (("80;90a", "+cu130.sm80.sm90a"), ("100a;120", "+cu130.sm100a.sm120"), ("none", "")))
def test_the_version_names_the_gpus(tmp_path, wish, said):
    result = version(tmp_path, wish)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == vtok_fast.__version__ + said


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
def test_a_wheel_for_no_gpu_is_not_named(tmp_path):
    result = version(tmp_path, "75")
    assert result.returncode and "need 80 (Ampere) or newer, got 75" in " ".join(result.stderr.split())


@pytest.mark.skipif(native.lib() is None or shutil.which("readelf") is None, reason="no native module, or no readelf")
def test_the_module_imports_without_a_driver():
    needed = subprocess.run(["readelf", "-d", native.lib().__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and not re.search(r"libcuda|libcudart", needed)
