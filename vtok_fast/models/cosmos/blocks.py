"""The layers of the Cosmos tokenizer, one small class per kind, in plain PyTorch.

They compute what the layers of https://github.com/NVIDIA/Cosmos-Tokenizer (Apache-2.0) compute, under the
same state-dict keys. Video tensors are (B, C, T, H, W). A causal layer repeats the first frame in front, and
sees zeros around each frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.common.layers import fold_frames, silu, unfold_frames

EPS = 1e-6  # of every norm
PLANE, TIME, POINT = (1, 3, 3), (3, 1, 1), (1, 1, 1)  # kernels


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame: `time_pad` copies of the first frame in front, `padding` zeros on
    all four sides."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        *,
        stride: int = 1,
        time_stride: int = 1,
        dilation: int = 1,
        time_dilation: int = 1,
        padding: int | None = None,
    ):
        super().__init__()
        self.padding = kernel_size[1] // 2 if padding is None else padding
        self.time_pad = time_dilation * (kernel_size[0] - 1) + 1 - time_stride
        self.conv3d = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size,
            stride=(time_stride, stride, stride),
            dilation=(time_dilation, dilation, dilation),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, :1].expand(-1, -1, self.time_pad, -1, -1), x), dim=2)
        return self.conv3d(F.pad(x, (self.padding,) * 4))


def factorized(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3x3 convolution in two steps: over H and W, then over T."""
    return nn.Sequential(
        CausalConv3d(in_channels, out_channels, PLANE), CausalConv3d(out_channels, out_channels, TIME)
    )


class Norm(nn.Module):
    """GroupNorm. One group: statistics of each frame, over C, H and W. More: over T too, which is not
    causal."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)

    @property
    def per_frame(self) -> bool:
        return self.norm.num_groups == 1

    def forward(self, x: Tensor) -> Tensor:
        return unfold_frames(self.norm(fold_frames(x)), x.shape[0]) if self.per_frame else self.norm(x)


class ResBlock(nn.Module):
    """norm, SiLU, factorized convolution, twice, and the residual. The first norm always has one group, as
    the official one."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 1, dropout: float = 0.0):
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = factorized(in_channels, out_channels)
        self.norm2 = Norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = factorized(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, POINT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class _Attention(nn.Module):
    """One head of self-attention, and the residual."""

    def __init__(self, channels: int, *, groups: int = 1):
        super().__init__()
        self.norm = Norm(channels, groups)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, CausalConv3d(channels, channels, POINT))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.proj_out(self.attend(self.q(y), self.k(y), self.v(y)))


class SpatialAttention(_Attention):
    """Among the H*W positions of each frame."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, c, t, h, w = q.shape
        q, k, v = (x.permute(0, 2, 3, 4, 1).reshape(b, t, h * w, c) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


class TemporalAttention(_Attention):
    """Among the frames of each position: a frame sees itself and earlier ones."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, c, t, h, w = q.shape
        q, k, v = (x.permute(0, 3, 4, 2, 1).reshape(b, h * w, t, c) for x in (q, k, v))
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .reshape(b, h, w, t, c)
            .permute(0, 4, 3, 1, 2)
        )


def attention_pair(channels: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        SpatialAttention(channels, groups=groups), TemporalAttention(channels, groups=groups)
    )


class _Resample(nn.Module):
    """What the two resampling layers share: conv1 and conv2 as the subclass makes them, and a 1x1x1
    convolution, conv3.

    `unused` also makes the convolutions that the flags leave out, frozen: the state dict of the 0.1 models
    has them.
    """

    def make(self, channels: int, conv1: bool, conv2: bool, unused: bool) -> None:
        kernels = {**self.KERNELS, "conv3": {"kernel_size": POINT}}
        for name, used in (("conv1", conv1), ("conv2", conv2), ("conv3", conv1 or conv2)):
            layer = CausalConv3d(channels, channels, **kernels[name]) if used or unused else nn.Identity()
            self.add_module(name, layer.requires_grad_(used))


class HybridDown(_Resample):
    """Halve H and W, and T (n -> n/2 rounded up), each as average pool plus strided convolution; then a 1x1x1
    convolution.

    The convolution over H and W sees a row and a column of zeros at the end; that over T one copy of the
    first frame more in front.
    """

    KERNELS = {
        "conv1": {"kernel_size": PLANE, "stride": 2, "padding": 0},
        "conv2": {"kernel_size": TIME, "time_stride": 2},
    }

    def __init__(self, channels: int, *, spatial: bool = True, temporal: bool = True, unused: bool = True):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.make(channels, spatial, temporal, unused)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.conv1(x) + pool(x, (1, 2, 2))
        if self.temporal:
            x = torch.cat((x[:, :, :1], x), dim=2)
            x = self.conv2(x) + pool(x, (2, 1, 1))
        return self.conv3(x) if self.spatial or self.temporal else x


class HybridUp(_Resample):
    """Double T (n -> 2n - 1), and H and W, each as repetition plus a convolution of it; then a 1x1x1
    convolution."""

    KERNELS = {"conv1": {"kernel_size": TIME}, "conv2": {"kernel_size": PLANE}}

    def __init__(self, channels: int, *, spatial: bool = True, temporal: bool = True, unused: bool = True):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.make(channels, temporal, spatial, unused)

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = x + self.conv1(x)
        if self.spatial:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.conv2(x)
        return self.conv3(x) if self.spatial or self.temporal else x


def pool(x: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """F.avg_pool3d, in float32 for narrower types: PyTorch has none for them on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.avg_pool3d(wide, kernel, stride=kernel).to(x.dtype)
