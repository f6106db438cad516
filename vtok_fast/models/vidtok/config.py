"""What a VidTok is made of, and the released models by name (https://github.com/microsoft/VidTok, MIT; arXiv
2412.13061)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtok_fast.models.common.tokenizer import Config


@dataclass(frozen=True)
class VidTokConfig(Config):
    """The structure of one VidTok, with the field names of the official configuration files where they exist.

    Attributes:
        version: "1.0" (zeros before the first frame) or "1.1" (copies of it; streaming; trilinear upsampling
            in time).
        causal: whether a frame sees only itself and earlier frames.
        regularizer: "fsq" (tokens are integers) or "kl" (tokens are continuous latents).
        levels: quantization levels of each latent channel (fsq only; one per z_channels).
        ch, ch_mult: channels of level i are ch * ch_mult[i]; level 0 has the full resolution.
        spatial_ds, tempo_ds: levels after which the encoder halves H and W, and T. None: all but the last;
            the two before the last.
        spatial_us, tempo_us: levels after which the decoder doubles them. None: all but level 0; levels 1 and
            2.
        time_downsample_factor: input frames per latent frame.
        norm_type: "layernorm" or "groupnorm" (32 groups; needs channels divisible by 32).
        interpolation_mode: "nearest" or "trilinear" (version 1.1 only), of the upsampling in time.
        init_pad_mode: how the causal encoder pads the front of a clip: "replicate", "constant" (zeros) or
            "reflect".
        entropy_loss_weight, entropy_loss_annealing_steps, entropy_loss_annealing_factor: the entropy term of
            the FSQ training loss, see `FSQRegularizer`.
        commitment_loss_weight, diversity_gamma: its commitment and diversity terms.
    """

    version: str = "1.0"
    causal: bool = True
    regularizer: str = "fsq"
    z_channels: int = 5
    levels: tuple[int, ...] | None = None
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_ds: tuple[int, ...] | None = None
    spatial_us: tuple[int, ...] | None = None
    tempo_ds: tuple[int, ...] | None = None
    tempo_us: tuple[int, ...] | None = None
    time_downsample_factor: int = 4
    norm_type: str = "layernorm"
    interpolation_mode: str = "nearest"
    init_pad_mode: str = "replicate"
    dropout: float = 0.0
    entropy_loss_weight: float = 0.1
    entropy_loss_annealing_steps: int = 2000
    entropy_loss_annealing_factor: float = 3.0
    commitment_loss_weight: float = 0.25
    diversity_gamma: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.ch_mult)
        defaults = {
            "spatial_ds": range(n - 1),
            "spatial_us": range(1, n),
            "tempo_ds": (n - 2, n - 3),
            "tempo_us": (1, 2),
        }
        for key in ("levels", "ch_mult", *defaults):
            value = getattr(self, key)
            value = defaults.get(key) if value is None else value
            object.__setattr__(self, key, value if value is None else tuple(int(v) for v in value))
        self.need_one_of("version", "1.0", "1.1")
        self.need_one_of("regularizer", "fsq", "kl")
        self.need_one_of("norm_type", "layernorm", "groupnorm")
        self.need_one_of("interpolation_mode", "nearest", "trilinear")
        self.need_one_of("init_pad_mode", "replicate", "constant", "reflect")
        if self.version == "1.1" and not self.causal:
            raise ValueError("causal=False: VidTok 1.1 has causal models only")
        if self.interpolation_mode == "trilinear" and self.version != "1.1":
            raise ValueError(f"interpolation_mode='trilinear' needs version '1.1', not {self.version!r}")
        if self.regularizer == "fsq" and (self.levels is None or len(self.levels) != self.z_channels):
            raise ValueError(
                f"levels={self.levels}: fsq needs one number of levels for each of the "
                f"z_channels={self.z_channels}"
            )
        if self.regularizer == "fsq" and (min(self.levels) < 2 or math.prod(self.levels) > 2**31):
            raise ValueError(
                f"levels={self.levels}: each must be at least 2, and their product at most 2**31"
            )
        if self.regularizer == "kl" and self.levels is not None:
            raise ValueError(f"levels={self.levels}: a kl model has no levels")
        steps_down = len(set(self.tempo_ds) & set(self.spatial_ds))
        if 2**steps_down != self.time_downsample_factor:
            raise ValueError(
                f"time_downsample_factor={self.time_downsample_factor}: the encoder halves T {steps_down} "
                f"times "
                f"(tempo_ds={self.tempo_ds}, spatial_ds={self.spatial_ds})"
            )
        if self.norm_type == "groupnorm" and any(self.ch * m % 32 for m in self.ch_mult):
            raise ValueError(
                f"norm_type='groupnorm' needs channels divisible by 32, not ch={self.ch} times "
                f"ch_mult={self.ch_mult}"
            )

    @property
    def double_z(self) -> bool:
        """Whether the encoder gives a mean and a log-variance for each latent channel."""
        return self.regularizer == "kl"

    @property
    def spatial_factor(self) -> int:
        """Input rows per latent row."""
        return 2 ** len(self.spatial_ds)


_16X16 = {"ch_mult": (1, 2, 4, 4, 4)}
_288 = {"tempo_ds": (1,), "tempo_us": (2,), "time_downsample_factor": 2}
_444 = {"spatial_ds": (1, 2), "spatial_us": (1, 2)}
_888 = {"tempo_ds": (0, 1, 2), "tempo_us": (1, 2, 3), "time_downsample_factor": 8}
_V1_1 = {"version": "1.1", "interpolation_mode": "trilinear"}
_NONCAUSAL = {"causal": False}


def _fsq(channels: int, *parts: dict) -> dict:
    return _merge({"z_channels": channels, "levels": (8,) * channels}, *parts)


def _kl(channels: int, *parts: dict) -> dict:
    return _merge({"z_channels": channels, "regularizer": "kl"}, *parts)


def _merge(*parts: dict) -> dict:
    return {key: value for part in parts for key, value in part.items()}


# <regularizer>_<causality>_<factors of T, H, W>_<codebook size or latent channels>. A 4x8x8 model turns 4
# frames of 8x8 pixels into one token.
CONFIGS: dict[str, dict[str, Any]] = {
    "fsq_causal_488_4096": _fsq(4),
    "fsq_causal_488_32768": _fsq(5),
    "fsq_causal_488_262144": _fsq(6),
    "fsq_causal_41616_262144": _fsq(6, _16X16),
    "fsq_noncausal_488_262144": _fsq(6, _NONCAUSAL),
    "fsq_noncausal_41616_262144": _fsq(6, _16X16, _NONCAUSAL),
    "kl_causal_488_4chn": _kl(4),
    "kl_causal_488_8chn": _kl(8),
    "kl_causal_488_16chn": _kl(16),
    "kl_causal_288_8chn": _kl(8, _288),
    "kl_causal_444_4chn": _kl(4, _444),
    "kl_causal_41616_4chn": _kl(4, _16X16),
    "kl_noncausal_488_4chn": _kl(4, _NONCAUSAL),
    "kl_noncausal_488_16chn": _kl(16, _NONCAUSAL),
    "kl_noncausal_41616_4chn": _kl(4, _16X16, _NONCAUSAL),
    "kl_noncausal_41616_16chn": _kl(16, _16X16, _NONCAUSAL),
    "v1_1_fsq_488_32768": _fsq(5, _V1_1),
    "v1_1_fsq_888_32768": _fsq(5, _888, _V1_1),
    "v1_1_fsq_41616_262144": _fsq(6, _16X16, _V1_1),
    "v1_1_kl_488_4chn": _kl(4, _V1_1),
    "v1_1_kl_488_16chn": _kl(16, _V1_1),
    "v1_1_kl_288_8chn": _kl(8, _288, _V1_1),
    "v1_1_kl_41616_16chn": _kl(16, _16X16, _V1_1),
    # Not a released model: small enough to train on a laptop, for 17x128x128 clips. 4x4x4, because at 128x128
    # a face has few pixels.
    "tiny": _fsq(6, {"ch": 16, "ch_mult": (1, 2, 3), "num_res_blocks": 1}),
}
VidTokConfig.presets = CONFIGS
