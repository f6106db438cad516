"""Checked calls of ``scope_attention`` as data, as every backend sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.ops.scope_attention.scope import Scope


class ScopeCall(NamedTuple):
    """One checked call."""

    q: Tensor
    k: Tensor
    v: Tensor
    scope: Scope
    scale: float


class ScopeBackwardCall(NamedTuple):
    """The gradient of a call's result, and what the call saved."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scope: Scope
    scale: float


def like(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in the strides that ``empty_like(x)`` has: what PyTorch's kernels give, except for tensors
    with gaps."""
    empty = torch.empty_like(x)
    return result if result.stride() == empty.stride() else empty.copy_(result)


# The ops' signatures. The three tensors of the scope are arguments: a compiled graph serves every scope.
_SCOPE = "Tensor q_offsets, Tensor range_offsets, Tensor ranges, float scale"
torch.library.define(
    "vtok_fast::scope_attention",
    f"(Tensor q, Tensor k, Tensor v, {_SCOPE}, str? backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "vtok_fast::scope_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SCOPE}, str? preferred) -> "
    "(Tensor, Tensor, Tensor)",
)
