"""Which of the native module's kernels a GPU runs. Only the standard library, because the doctor asks
without torch."""

from __future__ import annotations

from collections.abc import Sequence

Capability = tuple[int, int]


def capability_of(arch: str) -> Capability:
    """``90a`` as (9, 0)."""
    number = int(arch.rstrip("af"))
    return number // 10, number % 10


def spelled(arch: str) -> str:
    """``90a`` as ``9.0a``, as PyTorch writes it."""
    major, minor = capability_of(arch)
    return f"{major}.{minor}{arch.lstrip('0123456789')}"


def code_for(gpu: Capability, archs: Sequence[str]) -> str | None:
    """What a module built for ``archs`` runs on a GPU of this compute capability: ``sm_90a``, its Hopper
    kernels, and only on that GPU; ``sm_80``, machine code for the same major and no newer minor version;
    ``compute_80``, the intermediate code of the lowest architecture, which the driver compiles at first use;
    or None."""
    if "90a" in archs and gpu == (9, 0):
        return "sm_90a"
    plain = sorted({capability_of(arch) for arch in archs})
    same = [p for p in plain if p[0] == gpu[0] and p <= gpu]
    if same:
        return f"sm_{same[-1][0]}{same[-1][1]}"
    return f"compute_{plain[0][0]}{plain[0][1]}" if plain and plain[0] <= gpu else None


def fit(gpu: Capability, archs: Sequence[str]) -> str:
    """The same in words."""
    built, here = ", ".join(map(spelled, archs)), f"this GPU is {gpu[0]}.{gpu[1]}"
    code = code_for(gpu, archs)
    if not archs:
        return f"built without CUDA kernels; {here}: using Triton and PyTorch"
    if code is None:
        return f"built for {built}; {here}: no kernel for it, using Triton and PyTorch"
    if code.startswith("compute"):
        return f"built for {built}; {here}: using {code}, compiled by the driver at first use"
    return f"built for {built}; {here}: using {code.replace('_', '')}"
