"""Versions of torch, cuDNN and Triton that are known to be bad for video models, and what cures them. Standard library alone.

Sources are issues and pull requests of github.com/pytorch/pytorch, by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Version = tuple[int, ...]
NEVER: Version = (9999,)


@dataclass(frozen=True)
class Pair:
    """A bad pair: torch and cuDNN each from a version (included) up to another (excluded). ``level`` as the doctor's findings:
    ``bad`` gives wrong results, ``hint`` costs time or memory. ``holds`` may ask for more, of the doctor's probe."""

    level: str
    torch: tuple[Version, Version]
    cudnn: tuple[Version, Version]
    text: str
    cure: str
    source: int
    holds: Callable[[dict], bool] = lambda probe: True


NEW_CUDNN = "install torch 2.10 or newer, which brings cuDNN 9.15, or pip install 'nvidia-cudnn-cu12>=9.15' (cu13 for CUDA 13)"
ANY = ((0,), NEVER)
PAIRS = (
    Pair("bad", ((0,), (2, 9)), ((9, 8), (9, 11)), "large 3D convolutions in bfloat16 give wrong results", NEW_CUDNN, 163539),
    Pair("bad", ((0,), (2, 9, 1)), ((9, 10, 2), (9, 16)), "3D convolutions in TF32 give wrong results",
         "torch.backends.cudnn.allow_tf32 = False, or torch 2.9.1 or newer, which leaves TF32 out there", 167024,
         lambda probe: probe.get("allow_tf32", True)),
    Pair("hint", ((2, 9), (2, 9, 1)), ANY,
         "3D convolutions in half precision leave cuDNN for a path that is 10 times slower and takes up to 17 times the memory",
         "use torch 2.9.1 or newer", 166643),
    Pair("hint", ((2, 9, 1), NEVER), ((9, 8), (9, 15)),
         "3D convolutions in half precision leave this cuDNN for a path that is slow and takes far more memory", NEW_CUDNN, 166643),
    Pair("hint", ((0,), (2, 9)), ((9, 11), (9, 15)), "3D convolutions in bfloat16 may take three times the memory of float32",
         NEW_CUDNN, 166643),
)


def version(text: str | int | None) -> Version | None:
    """``2.9.1+cu128`` or ``91002``, as torch.backends.cudnn.version() counts, as numbers; None for None."""
    if text is None:
        return None
    if isinstance(text, int):
        major = 10000 if text >= 90000 else 1000  # from cuDNN 9 on there are two digits for the minor version
        return text // major, text % major // 100, text % 100
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[:len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


def found(probe: dict) -> list[Pair]:
    """The bad pairs of an environment: ``torch`` and ``cudnn`` of the doctor's probe. None where there is no GPU."""
    torch, cudnn = version(probe.get("torch")), version(probe.get("cudnn"))
    if not probe.get("cuda") or torch is None or cudnn is None:
        return []
    return [pair for pair in PAIRS
            if pair.torch[0] <= torch < pair.torch[1] and pair.cudnn[0] <= cudnn < pair.cudnn[1] and pair.holds(probe)]


def triton_of(requirements: list[str]) -> str | None:
    """The Triton that a torch was built with, of its metadata's requirements: ``triton==3.6.0; platform_system == "Linux"``."""
    for line in requirements:
        name, _, rest = line.partition("==")
        if name.strip() == "triton":
            return rest.split(";")[0].strip()
    return None
