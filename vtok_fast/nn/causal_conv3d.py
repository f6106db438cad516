"""``nn.CausalConv3d``: ``torch.nn.Conv3d`` with virtual padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.ops.causal_conv3d import causal_conv3d


class CausalConv3d(nn.Conv3d):
    """A causal 3D convolution over (B, C, T, H, W) in place of "pad, then ``nn.Conv3d``".

    Constructor and state keys (``weight``, ``bias``) are ``nn.Conv3d``'s, except that padding is given as in
    `vtok_fast.causal_conv3d`, whose options are here too. With a stride above 1 in height or width
    ``spatial_pad`` must be given.

    Raises ValueError where it is not; ``forward`` raises as `vtok_fast.causal_conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        time_pad: Sequence[int] | None = None,
        spatial_pad: Sequence[Sequence[int]] | None = None,
        time_mode: str = "zeros",
        spatial_mode: str = "zeros",
        activation: str | None = None,
        upsample: Sequence[int] = (1, 1, 1),
        upsample_first_frame_once: bool = False,
        depth_to_space: Sequence[int] = (1, 1, 1),
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.options: dict[str, Any] = {
            "time_pad": time_pad,
            "spatial_pad": spatial_pad,
            "time_mode": time_mode,
            "spatial_mode": spatial_mode,
            "activation": activation,
            "upsample": tuple(upsample),
            "upsample_first_frame_once": upsample_first_frame_once,
            "depth_to_space": tuple(depth_to_space),
            "backend": backend,
        }
        if spatial_pad is None and max(self.stride[1:]) > 1:
            raise ValueError(
                f"spatial_pad: must be given with stride {self.stride}, because 'same' is ambiguous there"
            )

    def forward(
        self,
        x: Tensor,
        cache: Tensor | None = None,
        residual: Tensor | None = None,
        alpha: float | Tensor | None = None,
    ) -> Tensor:
        """Convolves ``x``; ``cache``, ``residual`` and ``alpha`` as in `vtok_fast.causal_conv3d`."""
        return causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            cache=cache,
            residual=residual,
            alpha=alpha,
            **self.options,
        )

    def extra_repr(self) -> str:
        given = {
            name: value
            for name, value in self.options.items()
            if value not in (None, False, "zeros", (1, 1, 1))
        }
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in given.items())])
