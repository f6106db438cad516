"""Which of the native module's kernels a GPU runs. Only the standard library, because the doctor asks
without torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

Capability = tuple[int, int]

NO_CUDA = "the native module was built without CUDA kernels; VTOK_FAST_CUDA_ARCHS chooses them at build time"
NOT_NVIDIA = "the CUDA kernels are for GPUs of NVIDIA"

# What scripts/wheels.py builds, one folder each. Code for 8.0 runs on 8.6 too. Every list also has the PTX of
# its lowest architecture, which newer GPUs compile at first use. ALL is one wheel for every GPU.
ALL = "all"
FAMILIES: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "sm80-89": ("80", "89"),
    "sm90a": ("90a",),
    "sm80-90a": ("80", "90a"),
    "sm100a-120": ("100a", "120"),
    ALL: ("80", "86", "89", "90a", "100a", "120"),
}
CUDA = "cu130"  # the toolkit that they are built with, unless an installed wheel names another


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


def family_for(gpu: Capability) -> str | None:
    """The family to install for a GPU: the first one with machine code for it, else the last one whose
    intermediate code its driver can compile; None for a GPU older than 8.0. Of those for few GPUs, whose
    wheels are the smaller ones."""
    few = {family: archs for family, archs in FAMILIES.items() if family != ALL}
    codes = {family: code for family, archs in few.items() if (code := code_for(gpu, archs))}
    return next(
        (family for family, code in codes.items() if code.startswith("sm_")), next(reversed(codes), None)
    )


def label(archs: Sequence[str], cuda: str = CUDA) -> str:
    """The local version label of a wheel: ``cu130.sm80.sm90a``; empty for CPUs only."""
    return ".".join([cuda, *(f"sm{arch}" for arch in archs)]) if archs else ""


def installed_version() -> str | None:
    """``0.1.0+cu130.sm90a``, where the package is installed."""
    try:
        return importlib.metadata.version("vtok-fast")
    except importlib.metadata.PackageNotFoundError:
        return None


def install(gpu: Capability, archs: Sequence[str], version: str | None) -> str:
    """What gives a GPU its own kernels, where ``version``, such as ``0.1.0+cu130.sm90a``, is installed with
    kernels for ``archs``: the wheel of its family, from the folder of that name, and a build of its own. With
    the exact version, because installers sort labels as words, and keep what is there if only the label
    differs. Empty for a GPU older than 8.0."""
    family = family_for(gpu)
    if family is None:
        return ""
    arch = f"{gpu[0]}{gpu[1]}{'a' if gpu == (9, 0) else ''}"
    build = f"in the source folder, with nvcc: VTOK_FAST_CUDA_ARCHS={arch} pip install ."
    if version is None or code_for(gpu, FAMILIES[family]) == code_for(gpu, archs):
        return build
    plain, _, built = version.partition("+")
    cuda = built.split(".")[0] if built.startswith("cu") else CUDA
    wheel = f"vtok-fast=={plain}+{label(FAMILIES[family], cuda)}"
    return f"pip install --find-links {cuda}-{family} {wheel}   or, {build}"
