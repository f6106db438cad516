"""Each op's gradient is the other op, which autograd can differentiate again."""

from __future__ import annotations

from typing import Any

import torch

from vtok_fast.dispatch import backends
from vtok_fast.ops.token_packing import call  # noqa: F401  the ops are defined there


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    backends.remember(ctx, inputs[-1])


def _pack_backward(ctx, grad_values, grad_indices, grad_cu_seqlens):
    (keep,) = backends.saved_tensors(ctx)
    with backends.remembered(ctx):
        grad = torch.ops.vtok_fast.unpack_tokens(grad_values, keep, 0.0, ctx.explicit_backend)
    return grad, None, None, None, None, None


torch.library.register_autograd("vtok_fast::pack_tokens", _pack_backward, setup_context=_pack_setup)


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]
    backends.remember(ctx, inputs[-1])


def _unpack_backward(ctx, grad):
    (mask,) = backends.saved_tensors(ctx)
    with backends.remembered(ctx):
        packed = torch.ops.vtok_fast.pack_tokens(grad, mask, ctx.rows, None, "vidtok", ctx.explicit_backend)
    return packed[0], None, None, None


torch.library.register_autograd("vtok_fast::unpack_tokens", _unpack_backward, setup_context=_unpack_setup)
