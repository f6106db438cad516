"""What a ProMAG is made of, and some by name (arXiv 2501.05442)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vtok_fast.models.common.tokenizer import Config

Triple = tuple[int, int, int]
_4X: tuple[Triple, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
_TINY = {"ch": 16, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 1, "mid_blocks": 1, "groups": 8}


@dataclass(frozen=True)
class ProMAGConfig(Config):
    """The structure of one ProMAG.

    The paper's figure and site state: a causal base of 4x8x8, its features before the 1x1x1 convolution to
    the latent, growth by 2 in time with the lower encoder frozen, the modulation and the residual path of the
    key frames, group norm without mean, 8 or 16 latent channels, chunks of 17 frames that overlap by 4 and
    are blended linearly, tiling layer by layer. Inferred: all widths and depths (those of Open-MAGVIT2, whose
    norms by the latent's statistics are left out), groups, per_frame, 16x as the same growth once more,
    key_embedding, where the base halves time, that new parts start as zero or as a copy, blending in pixels,
    that key frames are frames 0, 2, 4, ..., aligned with the grown model's latent frames, and the weight of
    the divergence, which is the caller's.

    Attributes:
        z_channels: of the latent, a diagonal Gaussian.
        ch, ch_mult: channels of level i are ch * ch_mult[i]; level 0 has the full resolution.
        strides: (time, height, width) from each level to the next one. The default is 4x8x8; a model that is
            compressed further at once, to compare with a grown one, has other strides.
        num_res_blocks, mid_blocks: residual blocks of each level, and at the lowest resolution.
        growth: how often the base has been grown; each time it makes half as many latent frames.
        growth_blocks: residual blocks of a growth, in the encoder and in the decoder.
        freeze_lower: whether a grown model's lower encoder, and the full resolution of its decoder, do not
            learn.
        key_embedding: the key frames' scales of the AdaNorm: one for each channel of a "frame", or of a
            "position".
        norm, groups, per_frame: "group_rms" (no mean) or "group"; statistics over (T, H, W), or per frame.
        chunk_frames, overlap: how a long video is cut; None: not at all.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            f"{4 * 2**growth}x_{z}chn": {"growth": growth, "z_channels": z}
            for growth in (0, 1, 2)
            for z in (8, 16)
        },
        "direct_8x_8chn": {"strides": ((2, 2, 2),) * 3},
        "direct_16x_8chn": {"strides": (*((2, 2, 2),) * 3, (2, 1, 1)), "ch_mult": (1, 2, 2, 4, 4)},
        # Not of the paper: small enough to train on a laptop, for 17x64x64 clips. To be grown, or 8x at once
        # to compare with.
        "tiny": _TINY,
        "tiny_8x": {**_TINY, "growth": 1},
        "tiny_16x": {**_TINY, "growth": 2},
        "tiny_direct_8x": {**_TINY, "strides": ((2, 2, 2),) * 3},
    }

    in_channels: int = 3
    z_channels: int = 8
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    strides: tuple[Triple, ...] = _4X
    num_res_blocks: int = 4
    mid_blocks: int = 4
    growth: int = 0
    growth_blocks: int = 1
    freeze_lower: bool = True
    key_embedding: str = "frame"
    norm: str = "group_rms"
    groups: int = 32
    per_frame: bool = False
    eps: float = 1e-6
    chunk_frames: int | None = 17
    overlap: int = 4

    def __post_init__(self) -> None:
        self.set_tuples("ch_mult", "strides")
        self.need_at_least(
            1, "in_channels", "z_channels", "ch", "num_res_blocks", "mid_blocks", "growth_blocks", "groups"
        )
        self.need_at_least(0, "growth", "overlap")
        self.need_one_of("key_embedding", "frame", "position")
        self.need_one_of("norm", "group_rms", "group")
        wrong = any(len(s) != 3 or not {*s} <= {1, 2} or s[1] != s[2] for s in self.strides)
        if wrong or len(self.strides) != len(self.ch_mult) - 1:
            raise ValueError(
                f"strides={self.strides}: {len(self.ch_mult)} levels of ch_mult need "
                f"{len(self.ch_mult) - 1}, each "
                "(time, height, width) of 1 and 2, height and width alike"
            )
        if any(self.ch * m % self.groups for m in self.ch_mult):
            raise ValueError(
                f"groups={self.groups} must divide ch={self.ch} times each of ch_mult={self.ch_mult}"
            )
        if self.chunk_frames is not None:
            if self.chunk_frames < 1 or (self.chunk_frames - 1) % self.time_downsample_factor:
                raise ValueError(
                    f"chunk_frames={self.chunk_frames} must be 1 + k * {self.time_downsample_factor}"
                )
            if self.overlap >= self.chunk_frames:
                raise ValueError(f"overlap={self.overlap} must be less than chunk_frames={self.chunk_frames}")

    @property
    def time_downsample_factor(self) -> int:
        return math.prod([s[0] for s in self.strides]) * 2**self.growth

    @property
    def spatial_factor(self) -> int:
        return math.prod([s[1] for s in self.strides])

    causal: ClassVar[bool] = True  # for `check_video`: any number of frames is taken, the end is filled up
