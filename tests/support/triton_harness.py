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
# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, technical specifications per
# compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: ``registers`` per thread, ``stack`` bytes per thread (spilled registers;
    0 where there are none), ``shared`` bytes per block, ``num_warps``; and its ``ptx``."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    ptx: str

    def has(self, pattern: str) -> bool:
        """Whether the PTX has a line that matches, such as ``wgmma`` or ``cp\\.async``."""
        return re.search(pattern, self.ptx) is not None


def compile_for(
    kernel,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    cc: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Iterable[str] = (),
) -> Resources:
    """Compiles a kernel for compute capability ``cc`` (80, 90, ...) without a GPU.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: the type of each argument at run time, such as ``{"x": "*fp16", "n": "i32"}``; those of
            ``constants`` may be left out.
        constants: the values of the ``tl.constexpr`` arguments; None for a pointer that is absent.
        aligned: arguments that are multiples of 16, as the launcher finds and tells the compiler at run time.
    """
    # In the order of the kernel's own arguments: Triton counts positions.
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, types, dict(constants), attributes),
        target=GPUTarget("cuda", cc, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
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
    # Warp specialisation adds warps to those asked for.
    return Resources(
        int(usage["REG"]),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        compiled.asm["ptx"],
    )


def assert_fits(resources: Resources, cc: int, spills: int = 0) -> None:
    """Fails where registers spill (more than ``spills`` bytes) or a block of this GPU has less shared
    memory."""
    assert resources.stack <= spills, f"sm_{cc}: {resources.stack} bytes of registers spill"
    assert resources.shared <= SHARED_LIMIT[cc], (
        f"sm_{cc}: {resources.shared} bytes of shared memory, {SHARED_LIMIT[cc]} exist"
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
