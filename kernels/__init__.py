"""Triton kernels and their launchers, one file per op. Installed as ``vtok_fast.kernels``."""

import contextlib

import torch

from vtok_fast.dispatch import tuning


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches; does nothing for the CPU of Triton's
    interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def unit_of(*sizes: int) -> int:
    """The unit, in elements, that all sizes and strides are multiples of: what a thread loads or stores at a
    time is at most that."""
    return next(unit for unit in (8, 4, 1) if not any(n % unit for n in sizes))


def tuned_tile(op: str, tensor: torch.Tensor, tile: tuple[int, int], *facts: object) -> tuple[int, int]:
    """(block, warps) of a launch that only moves or adds up values: the given one, or what a tuning table has
    for this class."""
    return tuning.chosen(op, tensor.device, tile, tiles_near, *facts)


def tiles_near(tile: tuple[int, int]) -> list[tuple[int, int]]:
    """What a tuning table may choose instead: as many values for each thread, or fewer, so that no register
    spills anew."""
    block, warps = tile
    near = (
        tile,
        (block, 2 * warps),
        (2 * block, 2 * warps),
        (block // 2, warps),
        (block // 2, warps // 2),
        (block // 4, warps // 2),
    )
    return [(b, w) for b, w in near if b >= 1 and 1 <= w <= 8]
