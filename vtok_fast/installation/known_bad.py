"""Versions of torch, cuDNN and others that are known to be bad for video models, and what cures them.
Only the standard library.

Sources are issues and pull requests on GitHub: ``pytorch`` is pytorch/pytorch, ``triton`` triton-lang/triton,
``diffusers`` huggingface/diffusers, ``vector-quantize-pytorch`` lucidrains/vector-quantize-pytorch. Looked
through up to torch 2.14.1, cuDNN 9.28, Triton 3.9 and diffusers 0.42.1; more were not found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Version = tuple[int, ...]
Span = tuple[Version, Version]  # from a version (included) up to another (excluded)
NEVER: Version = (9999,)
ANY: Span = ((0,), NEVER)


@dataclass(frozen=True)
class Pair:
    """Versions that are bad together: of torch, and of cuDNN on a GPU (None: it does not matter, nor does a
    GPU) or of another ``package``, which counts where it is installed. ``level`` as the doctor's findings:
    ``bad`` gives wrong results, ``hint`` costs time or memory, or is wrong only in some uses. ``holds`` may
    ask for more, of the doctor's probe."""

    level: str
    torch: Span
    cudnn: Span | None
    text: str
    cure: str
    source: str
    holds: Callable[[dict], bool] = lambda probe: True
    package: tuple[str, Span] | None = None


NEW_CUDNN = (
    "install torch 2.10 or newer, which brings cuDNN 9.15, "
    "or pip install 'nvidia-cudnn-cu12>=9.15' (cu13 for CUDA 13)"
)


def has_gpu(*capability: int) -> Callable[[dict], bool]:
    """Whether there is a GPU of this compute capability, or with one number, of this major version."""
    return lambda probe: any(
        tuple(gpu["capability"])[: len(capability)] == capability for gpu in probe.get("gpus") or ()
    )


PAIRS = (
    Pair(
        "bad",
        ((0,), (2, 9)),
        ((9, 8), (9, 11)),
        "large 3D convolutions in bfloat16 give wrong results",
        NEW_CUDNN,
        "pytorch#163539",
    ),
    Pair(
        "bad",
        ((0,), (2, 9, 1)),
        ((9, 10, 2), (9, 16)),
        "3D convolutions in TF32 give wrong results",
        "torch.backends.cudnn.allow_tf32 = False, or torch 2.9.1 or newer, which leaves TF32 out there",
        "pytorch#167024",
        lambda probe: probe.get("allow_tf32", True),
    ),
    Pair(
        "hint",
        ((2, 9), (2, 9, 1)),
        ANY,
        "3D convolutions in half precision leave cuDNN for a path that is 10 times slower and takes up to "
        "17 times the memory",
        "use torch 2.9.1 or newer",
        "pytorch#166643",
    ),
    Pair(
        "hint",
        ((2, 9, 1), NEVER),
        ((9, 8), (9, 15)),
        "3D convolutions in half precision leave this cuDNN for a path that is slow and takes far more "
        "memory",
        NEW_CUDNN,
        "pytorch#166643",
    ),
    Pair(
        "hint",
        ((0,), (2, 9)),
        ((9, 11), (9, 15)),
        "3D convolutions in bfloat16 may take three times the memory of float32",
        NEW_CUDNN,
        "pytorch#166643",
    ),
    Pair(
        "hint",
        ((2, 10), (2, 14)),
        None,  # both ends are those of torch's source: BACKEND came with 2.10, the repair with 2.14
        "FlexAttention with BACKEND='FLASH' ignores a sparse BlockMask whose mask_mod is trivial, and gives "
        "wrong results",
        "use torch 2.14 or newer, or leave BACKEND at AUTO or TRITON",
        "pytorch#188322",
        lambda probe: bool(probe.get("cuda")),
        ("flash-attn-4", ANY),
    ),
    Pair(
        "hint",
        ANY,
        ((9, 23, 1), (9, 24)),
        "convolutions on GPUs of compute capability 8.6 give other results from run to run",
        "pip install 'nvidia-cudnn-cu13>=9.24' (cu12 for CUDA 12)",
        "pytorch#188288",
        has_gpu(8, 6),
    ),
    Pair(
        "hint",
        ANY,
        None,
        "torch.compile may miscompile copies of slices, and gives wrong results",
        "use torch 2.14 or newer, which brings Triton 3.8, or leave such code out of torch.compile",
        "pytorch#193183",
        lambda probe: bool(probe.get("cuda")),
        ("triton", ((3, 7), (3, 8))),
    ),
    Pair(
        "hint",
        ANY,
        None,
        "two tl.dot into one accumulator in a loop give wrong results on GPUs of compute capability 10.x",
        "give each product an accumulator of its own, and add them behind the loop",
        "triton#10821",
        has_gpu(10),
        ("triton", ((3, 6), (3, 9))),
    ),
    Pair(
        "hint",
        ANY,
        None,
        "AutoencoderKLWan with a patch size (Wan 2.2's) fails, or gives wrong results, with enable_tiling()",
        "pip install 'diffusers>=0.36'",
        "diffusers#12753",
        package=("diffusers", ((0, 33), (0, 36))),
    ),
    Pair(
        "bad",
        ANY,
        None,
        "its FSQ in bfloat16 counts indices in bfloat16 and reaches about half of the codes",
        "pip install 'vector-quantize-pytorch>=1.14.4', or quantize in float32, or use vtok_fast.nn.FSQ",
        "vector-quantize-pytorch#114",
        package=("vector-quantize-pytorch", ((0,), (1, 14, 4))),
    ),
)
PACKAGES = sorted({pair.package[0] for pair in PAIRS if pair.package})


def version(text: str | int | None) -> Version | None:
    """``2.9.1+cu128`` or ``91002``, as torch.backends.cudnn.version() counts, as numbers; None for None."""
    if text is None:
        return None
    if isinstance(text, int):
        major = 10000 if text >= 90000 else 1000  # from cuDNN 9 on there are two digits for the minor version
        return text // major, text % major // 100, text % 100
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


def found(probe: dict) -> list[Pair]:
    """The bad pairs of an environment, of the doctor's probe: ``torch``, ``cudnn`` where there is a GPU,
    ``packages`` by name."""
    torch, packages = version(probe.get("torch")), probe.get("packages") or {}
    cudnn = version(probe.get("cudnn")) if probe.get("cuda") else None

    def holds(pair: Pair) -> bool:
        name, span = pair.package or ("", None)
        return (
            _within(torch, pair.torch)
            and (pair.cudnn is None or _within(cudnn, pair.cudnn))
            and (span is None or _within(version(packages.get(name)), span))
            and pair.holds(probe)
        )

    return [pair for pair in PAIRS if holds(pair)]


def _within(here: Version | None, span: Span) -> bool:
    return here is not None and span[0] <= here < span[1]


def triton_of(requirements: list[str]) -> str | None:
    """The Triton that a torch was built with, as its metadata asks for it: ``==3.7.1``, or from torch 2.14 on
    ``~=3.8.0``, for any 3.8; None where it asks for none."""
    for line in requirements:
        found = re.match(r"\s*triton\s*\(?\s*(==|~=)\s*([\w.+]+)", line)
        if found:
            return "".join(found.groups())
    return None


def is_triton(here: str, wanted: str) -> bool:
    """Whether an installed Triton is what `triton_of` found."""
    if wanted.startswith("=="):
        return here == wanted[2:]
    lowest, found = version(wanted[2:]), version(here)
    return found is not None and found >= lowest and found[: len(lowest) - 1] == lowest[:-1]
