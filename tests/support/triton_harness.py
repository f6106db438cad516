"""Proof of Triton kernels on a machine without a GPU: run under Triton's interpreter, and compiled ahead of
time.

The interpreter is chosen when a kernel is imported, and for the functions of ``triton.language`` when Triton
itself is. So the tests that need it live in files ``*_interpreted.py``, which pytest does not collect by
itself, and an ordinary test runs such a file in a process of its own with `run_interpreted`. Use
float32 and float16 there: the interpreter's ``tl.dot`` is wrong in bfloat16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 100, 120)
AMD = ("gfx942", "gfx950")  # MI300, MI350
# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, technical specifications per
# compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_LIMIT |= dict.fromkeys(AMD, 64 << 10)  # of LDS; gfx950 has 160 KB, but two blocks are to fit


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: ``registers`` per thread, ``stack`` bytes per thread (spilled registers;
    0 where there are none), ``shared`` bytes per block, ``num_warps``; its ``ptx`` (of AMD the assembly) and
    the machine code of NVIDIA's."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    ptx: str
    cubin: bytes = b""

    def has(self, pattern: str) -> bool:
        """Whether the PTX has a line that matches, such as ``wgmma`` or ``cp\\.async``."""
        return re.search(pattern, self.ptx) is not None

    def code(self) -> list[str]:
        """The instructions of the machine code, and its labels, in order."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(self.cubin)
            cubin.flush()
            command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = re.findall(r"^\s*(\.L_x_\d+:)|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", said, re.M)
        return [label or instruction for label, instruction in lines]

    def instructions(self, pattern: str = "") -> int:
        """How many there are that begin so, whatever guards them; NOPs that fill up the end do not count."""
        found = (re.sub(r"^@!?U?P\w+ +", "", line) for line in self.code() if not line.endswith(":"))
        return sum(1 for line in found if not line.startswith("NOP") and re.match(pattern, line))

    def loops(self) -> list[list[str]]:
        """The instructions of each innermost loop of the machine code, the longest first. What is between
        a backward jump and its target is a loop; it is innermost where no other lies within."""
        code, labels = [], {}
        for line in self.code():
            if line.endswith(":"):
                labels[line[:-1]] = len(code)
            else:
                code.append(line)
        jumps = [
            (labels[found[1]], i + 1)
            for i, line in enumerate(code)
            if (found := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and labels.get(found[1], i + 1) < i
        ]
        innermost = [
            (a, b) for a, b in jumps if not any((a, b) != (c, d) and a <= c and d <= b for c, d in jumps)
        ]
        return sorted((code[a:b] for a, b in innermost), key=len, reverse=True)


def source(kernel, types: dict, constants: dict, aligned: Iterable[str]) -> ASTSource:
    """The kernel with its types, for the Triton that is installed: 3.2 still had attributes of its own."""
    places = [kernel.arg_names.index(name) for name in aligned]
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        attributes = {(place,): [["tt.divisibility", 16]] for place in places}
        return ASTSource(kernel, types, dict(constants), attributes)
    run_time = {name: kind for name, kind in types.items() if kind != "constexpr"}
    return ASTSource(kernel, run_time, dict(constants), AttrsDescriptor.from_hints(dict.fromkeys(places, 16)))


def build(kernel, signature, constants, cc, num_warps=4, num_stages=3, aligned=(), options=None):
    """What Triton makes of a kernel; arguments as for `compile_for`."""
    # In the order of the kernel's own arguments: Triton counts positions.
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    return triton.compile(
        source(kernel, types, dict(constants), aligned),
        target=GPUTarget("hip", cc, 64) if isinstance(cc, str) else GPUTarget("cuda", cc, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )


def compile_for(
    kernel,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    cc: int | str,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Iterable[str] = (),
    options: Mapping[str, object] | None = None,
) -> Resources:
    """Compiles a kernel for compute capability ``cc`` (80, 90, ...) or for AMD's "gfx942", without a GPU.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: the type of each argument at run time, such as ``{"x": "*fp16", "n": "i32"}``; those of
            ``constants`` may be left out.
        constants: the values of the ``tl.constexpr`` arguments; None for a pointer that is absent.
        aligned: arguments that are multiples of 16, as the launcher finds and tells the compiler at run time.
        options: others of Triton's, such as ``enable_fp_fusion``.
    """
    compiled, amd = (
        build(kernel, signature, constants, cc, num_warps, num_stages, aligned, options),
        isinstance(cc, str),
    )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if amd:
        assembly = compiled.asm["amdgcn"]
        usage = {
            name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)
        }
        return Resources(usage["vgpr_count"], 4 * usage["vgpr_spill_count"], shared, warps, assembly)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    # Warp specialization adds warps to those asked for.
    return Resources(
        int(usage["REG"]),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        shared,
        warps,
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )


def assert_fits(resources: Resources, cc: int | str, spills: int = 0) -> None:
    """Fails where registers spill (more than ``spills`` bytes) or a block of this GPU has less shared
    memory."""
    assert resources.stack <= spills, f"{cc}: {resources.stack} bytes of registers spill"
    assert resources.shared <= SHARED_LIMIT[cc], (
        f"{cc}: {resources.shared} bytes of shared memory, {SHARED_LIMIT[cc]} exist"
    )


def run_interpreted(file: str | Path, *options: str) -> str:
    """Runs the tests of ``file`` (``*_interpreted.py``) under Triton's interpreter; returns pytest's summary
    line.

    Fails, with what pytest said, where one of them fails or there are none.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "support.interpreter",
        f"--rootdir={ROOT}",
        str(file),
        *options,
    ]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"{Path(file).name} under the interpreter:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    )
    return result.stdout.strip().splitlines()[-1]
