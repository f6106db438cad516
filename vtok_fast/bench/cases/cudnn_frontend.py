"""cuDNN through its own frontend, where that is installed: the best that cuDNN itself can do with a causal
convolution.

PyTorch's convolution pads both sides alike and adds the bias in another pass. cuDNN's takes a pad before and
a pad behind each axis, and has the bias in its epilogue (its package: nvidia-cudnn-frontend). Only what
computes the same as eager becomes a peer.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench.harness import Candidate

NAME = "cuDNN frontend"
LAST = torch.channels_last_3d


def peer(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    cache: Tensor | None,
    want: Tensor,
    *,
    stride: Any,
    front: int,
    pads: Any,
    replicate: bool,
) -> tuple[Candidate | None, str]:
    """The candidate for channels-last tensors, or None and why there is none. ``want`` is what eager
    gives."""
    try:
        cudnn = importlib.import_module("cudnn")
    except ImportError as error:
        return None, str(error)
    try:
        # Nonzero frames must precede the video
        join = front > 0 and (cache is not None or replicate)
        run = partial(
            _run,
            _plan(
                cudnn, _joined(x, cache, front) if join else x, w, b, want, stride, 0 if join else front, pads
            ),
            front=front if join else 0,
        )
        got = run(x, w, b, cache)
    except Exception as error:  # whatever a shape that no engine takes may raise
        return (
            None,
            f"{type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}",
        )
    if not (got.double() - want.double()).norm() <= 2 * parity.floor(want.dtype) * want.double().norm():
        return None, "another result than eager's"
    return Candidate(NAME, run, inputs=(x, w, b, cache)), ""


def _joined(x: Tensor, cache: Tensor | None, front: int) -> Tensor:
    earlier = x[:, :, :1].expand(-1, -1, front, -1, -1) if cache is None else cache
    return torch.cat([earlier, x], 2)


def _plan(
    cudnn: Any, x: Tensor, w: Tensor, b: Tensor, want: Tensor, stride: Any, front: int, pads: Any
) -> dict[str, Any]:
    types = cudnn.data_type
    kind = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, torch.float32: types.FLOAT}[x.dtype]
    handle = cudnn.create_handle()
    cudnn.set_stream(
        handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    )
    graph = cudnn.pygraph(
        handle=handle, io_data_type=kind, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT
    )
    (top, bottom), (left, right) = pads
    image, weight, bias = graph.tensor_like(x), graph.tensor_like(w), graph.tensor_like(_per_channel(b))
    product = graph.conv_fprop(
        image=image,
        weight=weight,
        pre_padding=[front, top, left],
        post_padding=[0, bottom, right],
        stride=list(stride),
        dilation=[1, 1, 1],
    )
    out = graph.bias(name="bias", input=product, bias=bias)
    out.set_output(True).set_data_type(kind).set_dim(list(want.shape)).set_stride(list(_empty(want).stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=x.device)
    return {
        "graph": graph,
        "tensors": (image, weight, bias, out),
        "workspace": workspace,
        "handle": handle,
        "like": want,
    }


def _run(
    plan: dict[str, Any], x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, *, front: int
) -> Tensor:
    x, y = _joined(x, cache, front) if front else x, _empty(plan["like"])
    plan["graph"].execute(
        dict(zip(plan["tensors"], (x, w, _per_channel(b), y))), plan["workspace"], handle=plan["handle"]
    )
    return y


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=LAST)


def _per_channel(b: Tensor) -> Tensor:
    return b.view(1, -1, 1, 1, 1).contiguous(memory_format=LAST)
