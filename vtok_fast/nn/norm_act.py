"""``nn.NormAct``: LayerNorm, RMSNorm or GroupNorm over video, and the activation that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.ops.norm_act import KINDS, norm_act


class NormAct(nn.Module):
    """A norm over (B, C, T, H, W), then SiLU where asked for.

    Its state keys ``weight`` and ``bias``, of one value per channel, are those of ``nn.LayerNorm(C)``,
    ``nn.GroupNorm(groups, C)`` and ``nn.RMSNorm(C)``. Options as in `vtok_fast.norm_act`.

    Args:
        num_channels: C.
        affine: whether there is a weight.
        bias: whether there is a bias; default: with ``affine`` for the kinds that subtract a mean.

    Raises ValueError for a number of channels, a kind or groups that do not fit; ``forward`` raises as
    `vtok_fast.norm_act`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        *,
        kind: str = "layer",
        groups: int = 1,
        per_frame: bool = False,
        eps: float = 1e-6,
        activation: str | None = None,
        affine: bool = True,
        bias: bool | None = None,
        rounding: str = "once",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"num_channels: expected at least 1, got {num_channels!r}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if not isinstance(groups, int) or groups < 1 or num_channels % groups:
            raise ValueError(f"groups: must divide the {num_channels} channels, got {groups!r}")
        self.num_channels = num_channels
        self.options: dict[str, Any] = {
            "kind": kind,
            "groups": groups,
            "per_frame": per_frame,
            "eps": eps,
            "activation": activation,
            "rounding": rounding,
            "backend": backend,
        }
        bias = affine and kind in ("layer", "group") if bias is None else bias
        for name, present in (("weight", affine), ("bias", bias)):
            parameter = (
                nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if present else None
            )
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        tail_frames: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalizes ``x``; ``residual``, ``scale``, ``shift`` and ``tail_frames`` as in
        `vtok_fast.norm_act`."""
        return norm_act(
            x,
            self.weight,
            self.bias,
            residual=residual,
            scale=scale,
            shift=shift,
            tail_frames=tail_frames,
            **self.options,
        )

    def extra_repr(self) -> str:
        defaults = {"groups": 1, "per_frame": False, "activation": None, "rounding": "once", "backend": None}
        given = {k: v for k, v in self.options.items() if k not in defaults or v != defaults[k]}
        return ", ".join([str(self.num_channels), *(f"{k}={v!r}" for k, v in given.items())])
