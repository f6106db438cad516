"""``router_scores``: how well each token of a video was predicted."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.reference import token_packing as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels know


class ScoresCall(NamedTuple):
    """One checked call, as backends see it."""

    video: Tensor
    reconstruction: Tensor
    grid: tuple[int, int, int]


def router_scores(
    video: Tensor, reconstruction: Tensor, grid: Sequence[int] = (4, 8, 8), *, backend: str | None = None
) -> Tensor:
    """InfoTok's router: the mean absolute error of each token's pixels, in one pass over both videos.

    Frame 0 is a group of its own; the others form groups of ``grid[0]``. Contract: *exact*. The mean is
    defined on integers, since a sum of floats depends on its order: each |video - reconstruction|, computed
    in float32, is cut to a multiple of 2^-30 and to at most 4096, the sum is exact, and it is divided in
    float64. Against a plain mean, at most 2^-30 is lost. A difference that is NaN makes its token's score
    NaN. No gradient.

    Args:
        video, reconstruction: (B, C, 1 + k grid[0], H, W), float32, float64, bfloat16 or float16, the same;
            any strides.
        grid: frames, rows and columns of pixels per token; rows and columns must divide H and W.

    Returns:
        (B, t, H / grid[1], W / grid[2]) with t = 1 + k, float32 (float64 for float64).

    Raises:
        TypeError: not floating point, or two dtypes.
        ValueError: shapes or grid do not fit; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    if not video.is_floating_point():
        raise TypeError(f"video: expected a floating point dtype, got {video.dtype}")
    if reconstruction.dtype != video.dtype:
        raise TypeError(
            f"reconstruction: expected the dtype of video, {video.dtype}, got {reconstruction.dtype}"
        )
    if video.dim() != 5 or video.shape[1] == 0 or video.shape[2] == 0:
        raise ValueError(
            f"video: expected (B, C, T, H, W) with a channel and a frame, got shape {tuple(video.shape)}"
        )
    if reconstruction.shape != video.shape or reconstruction.device != video.device:
        raise ValueError(
            f"reconstruction: expected the shape and device of video, {tuple(video.shape)} on "
            f"{video.device}, got "
            f"{tuple(reconstruction.shape)} on {reconstruction.device}"
        )
    grid = tuple(map(operator.index, grid))
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid: expected (frames, rows, columns) per token, each at least 1, got {grid}")
    for name, size, step in (
        ("frames after the first", video.shape[2] - 1, grid[0]),
        ("rows", video.shape[3], grid[1]),
        ("columns", video.shape[4], grid[2]),
    ):
        if size % step:
            raise ValueError(f"grid: {grid} must divide video, whose {name} are {size}")
    if video.shape[1] * math.prod(grid) > reference.MAX_COUNT:
        raise ValueError(
            f"grid: at most {reference.MAX_COUNT} values per token, got {grid} of {video.shape[1]} channels"
        )
    call = ScoresCall(video.detach(), reconstruction.detach(), grid)
    if native.is_plain(call.video, call.reconstruction):
        return backends.select("router_scores", call, backend).run(call)
    return torch.ops.vtok_fast.router_scores(*call, backend)


# ---- backends ----------------------------------------------------------------------------------------------


def _why_not_cpu(call: ScoresCall) -> backends.Reason:
    return native.why_not_on_cpu(call.video, DTYPES)


def _output(call: ScoresCall) -> Tensor:
    b, _, t, h, w = call.video.shape
    frames, rows, columns = call.grid
    wide = torch.float64 if call.video.dtype == torch.float64 else torch.float32
    return call.video.new_empty((b, 1 + (t - 1) // frames, h // rows, w // columns), dtype=wide)


def _run_cpu(call: ScoresCall) -> Tensor:
    scores = _output(call)
    arg = native.arg
    native.lib().router_scores(
        arg(call.video), arg(call.reconstruction), arg(scores), *call.grid, native.threads()
    )
    return scores


def _why_not_triton(call: ScoresCall) -> backends.Reason:
    if call.video.dtype not in DTYPES:
        return f"no {call.video.dtype} kernel"
    return backends.why_not_triton_on(call.video)


@tuning.guarded("token_packing")
def _run_triton(call: ScoresCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    return kernels.router_scores(*call)


backends.register(
    "router_scores",
    backends.Backend("triton", _why_not_triton, _run_triton),
    backends.Backend("cpu", _why_not_cpu, _run_cpu),
    backends.Backend("reference", lambda call: None, lambda call: reference.router_scores(*call)),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::router_scores", "(Tensor video, Tensor reconstruction, int[] grid, str? backend) -> Tensor"
)


@torch.library.impl("vtok_fast::router_scores", ("cpu", "cuda"))
def _impl(video, reconstruction, grid, backend):
    call = ScoresCall(video, reconstruction, tuple(grid))
    return backends.select("router_scores", call, backend).run(call)


@torch.library.register_fake("vtok_fast::router_scores")
def _fake(video, reconstruction, grid, backend):
    return _output(ScoresCall(video, reconstruction, tuple(grid)))
