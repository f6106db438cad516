"""``nn.ScopeAttention``: multi-head attention in which a ``Scope`` says what each token sees; and rotary
positions on grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope


def rotary_angles(
    grid: Sequence[int], head_dim: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """The angles (positions, head_dim / 2), float64, by which pairs of a head turn at each position of a
    grid: (h, w), (t, h, w).

    The frequencies theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864) are dealt to the axes in turn, and the
    pairs of one axis lie together: on (h, w) pairs 0 and 1 of a head of 8 turn with the row, at frequencies 0
    and 2, pairs 2 and 3 with the column, at 1 and 3, as in InfoTok. Tokens that are nowhere on the grid do
    not turn: give them rows of zeros.
    """
    if head_dim < 2 * len(grid) or head_dim % 2:
        raise ValueError(
            f"head_dim: expected an even number, with a pair for each of {len(grid)} axes at least, got "
            f"{head_dim}"
        )
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    positions = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij"
    )
    return torch.cat(
        [p.flatten()[:, None] * frequencies[axis :: len(grid)] for axis, p in enumerate(positions)], 1
    )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighboring pairs of ``x`` (..., S, D) by ``angles`` (n, D / 2), which begin anew every n rows,
    in float32 or more."""
    if (
        angles.dim() != 2
        or angles.shape[1] * 2 != x.shape[-1]
        or not len(angles)
        or x.shape[-2] % len(angles)
    ):
        raise ValueError(
            f"angles: expected (n, {x.shape[-1] // 2}) with n a divisor of the {x.shape[-2]} tokens, "
            f"got {tuple(angles.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (f(angles).to(wide) for f in (torch.cos, torch.sin))
    a, b = x.to(wide).unflatten(-2, (-1, len(angles))).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).flatten(-3, -2).to(x.dtype)


class ScopeAttention(nn.MultiheadAttention):
    """In place of ``nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)``, with its state keys and
    its results under the mask that the scope stands for.

    Args:
        embed_dim: C, split among the heads.
        num_heads: divides ``embed_dim``.
        bias: whether the projections have one.
        twice: project the input twice with the same weights, rotary positions in between, as the released
            InfoTok does.
        backend: as in `vtok_fast.scope_attention`.

    Raises ValueError where the heads do not divide the channels.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        *,
        twice: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the {embed_dim} channels, got {num_heads}")
        super().__init__(embed_dim, num_heads, bias=bias, batch_first=True, device=device, dtype=dtype)
        self.twice, self.backend = twice, backend

    def forward(  # type: ignore[override]  # nn.MultiheadAttention's has masks
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        scope: Scope | None = None,
        angles: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Attends.

        Args:
            query: (B, Sq, C).
            key, value: (B, Sk, C); default ``query``, and ``key``.
            scope: of Sq queries and Sk keys; default: everything sees everything.
            angles: of rotary positions, see `rotary_angles`; those of queries and keys alike.
            need_weights: must be False: there are no weights to give.

        Returns:
            (B, Sq, C), and None where ``nn.MultiheadAttention`` gives weights.

        Raises ValueError for shapes that do not fit, or ``need_weights``; otherwise as
        `vtok_fast.scope_attention`.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[2] != self.embed_dim:
                raise ValueError(f"{name}: expected (B, S, {self.embed_dim}), got shape {tuple(x.shape)}")
        if need_weights:
            raise ValueError("need_weights: expected False, because no weights are ever stored")
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if key is query and value is query:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q, k, v = map(F.linear, (query, key, value), self.in_proj_weight.chunk(3), bias)
        q, k, v = self._heads(q, angles), self._heads(k, angles), self._heads(v)
        if self.twice:
            q, k, v = (
                self._heads(F.linear(x.transpose(1, 2).flatten(2), w, b))
                for x, w, b in zip((q, k, v), self.in_proj_weight.chunk(3), bias)
            )
        if scope is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = scope_attention(q, k, v, scope, backend=self.backend)
        return self.out_proj(y.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x if angles is None else rotate(x, angles)

    def extra_repr(self) -> str:
        given = [
            f"{name}={value!r}" for name, value in (("twice", self.twice), ("backend", self.backend)) if value
        ]
        return ", ".join([f"{self.embed_dim}, {self.num_heads}", *given])
