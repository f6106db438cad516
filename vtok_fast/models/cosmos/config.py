"""What a Cosmos tokenizer is made of, and the released video models by name.

Source: https://github.com/NVIDIA/Cosmos-Tokenizer (Apache-2.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtok_fast.models.common.tokenizer import Config


@dataclass(frozen=True)
class CosmosConfig(Config):
    """The structure of one Cosmos video tokenizer. Field names are those of the official configuration files,
    where they have them.

    Attributes:
        formulation: "FSQ" (tokens are integers), "AE" (latents) or "VAE" (latents: the mean of a Gaussian).
        levels: quantization levels of each latent channel (FSQ only).
        latent_channels: of AE and VAE; with FSQ there is one per level.
        spatial_compression, temporal_compression: pixels and frames per token. The patcher takes `patch_size`
            of them, the levels the rest.
        patch_size, patch_method: 1, 2, 4 or 8 in T, H and W; "haar" (wavelets) or "rearrange" (pixels into
            channels).
        channels, channels_mult: channels of level i are channels * channels_mult[i]; level 0 has the full
            (patched) resolution.
        decoder_channels_mult: the decoder's own, None for the same.
        num_res_blocks: per level of the encoder; the decoder has one more.
        z_channels, z_factor: channels between the encoder and the 1x1x1 convolution before the bottleneck:
            z_channels * z_factor.
        resolution, attn_resolutions: a level has attention where resolution / patch_size / 2^level is in
            attn_resolutions.
        num_groups: of the norms; 1 takes its statistics per frame, any other number over T, H and W, which is
            not causal.
        legacy_mode: the decoder doubles T at other levels (weights from before September 2024). That no
            preset uses it is inferred.
        layout: of the state dict. "0.1" has every convolution of a resampling level, used or not; "predict1"
            only those in use, and the constants of patcher and quantizer.
    """

    formulation: str = "FSQ"
    levels: tuple[int, ...] | None = None
    latent_channels: int | None = None
    spatial_compression: int = 8
    temporal_compression: int = 8
    patch_size: int = 4
    patch_method: str = "haar"
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channels_mult: tuple[int, ...] = (2, 4, 4)
    decoder_channels_mult: tuple[int, ...] | None = None
    num_res_blocks: int = 2
    z_channels: int = 16
    z_factor: int = 1
    resolution: int = 1024
    attn_resolutions: tuple[int, ...] = (32,)
    num_groups: int = 1
    dropout: float = 0.0
    legacy_mode: bool = False
    layout: str = "0.1"

    def __post_init__(self) -> None:
        self.set_tuples("levels", "channels_mult", "decoder_channels_mult", "attn_resolutions")
        self.need_one_of("formulation", "FSQ", "AE", "VAE")
        self.need_one_of("patch_method", "haar", "rearrange")
        self.need_one_of("patch_size", 1, 2, 4, 8)
        self.need_one_of("layout", "0.1", "predict1")
        self.need_at_least(
            1,
            "channels",
            "num_res_blocks",
            "z_channels",
            "z_factor",
            "num_groups",
            "in_channels",
            "out_channels",
        )
        for name in ("spatial_compression", "temporal_compression"):
            factor = getattr(self, name)
            if factor not in (1, 2, 4, 8, 16, 32) or factor < self.patch_size:
                raise ValueError(
                    f"{name}={factor} must be a power of two, at most 32 and at least "
                    f"patch_size={self.patch_size}"
                )
        if not self.channels_mult:
            raise ValueError("channels_mult=() has no level")
        self._check_bottleneck()
        self._check_levels()

    def _check_bottleneck(self) -> None:
        if self.formulation != "FSQ":
            if self.levels is not None or self.latent_channels is None:
                raise ValueError(
                    f"formulation={self.formulation!r} has latent_channels, not {self.latent_channels}, and "
                    f"no levels"
                )
            if self.formulation == "VAE" and self.z_factor != 2:
                raise ValueError(f"z_factor={self.z_factor}: a VAE has 2, for mean and log-variance")
            return
        if (
            self.levels is None
            or len(self.levels) == 0
            or self.latent_channels not in (None, len(self.levels))
        ):
            raise ValueError(
                f"levels={self.levels}: formulation 'FSQ' has one number per latent channel "
                f"({self.latent_channels})"
            )
        if min(self.levels) < 2 or math.prod(self.levels) > 2**31:
            raise ValueError(
                f"levels={self.levels}: each must be at least 2, and their product at most 2**31"
            )
        object.__setattr__(self, "latent_channels", len(self.levels))

    def _check_levels(self) -> None:
        """The levels that resample must give the compression that is promised."""
        for axis, factor, down, up in (
            ("spatial", self.spatial_compression, self.downs("spatial"), self.ups("spatial")),
            ("temporal", self.temporal_compression, self.downs("temporal"), self.ups("temporal")),
        ):
            for part, levels in (("encoder", down), ("decoder", up)):
                if self.patch_size * 2 ** sum(levels) != factor:
                    raise ValueError(
                        f"{axis}_compression={factor}: the {part} gives {self.patch_size * 2 ** sum(levels)} "
                        f"(patch_size={self.patch_size}, then {sum(levels)} of {len(levels)} levels)"
                    )

    def halvings(self, axis: str) -> int:
        """How often the levels halve that axis ("spatial" or "temporal")."""
        return int(math.log2(getattr(self, f"{axis}_compression") // self.patch_size))

    def downs(self, axis: str) -> list[bool]:
        """Per level of the encoder, whether it halves that axis."""
        return [level < self.halvings(axis) for level in range(len(self.channels_mult) - 1)]

    def ups(self, axis: str) -> list[bool]:
        """Per level of the decoder from the deepest, whether it doubles that axis."""
        n_t, n_s = self.halvings("temporal"), self.halvings("spatial")
        first = 0 if self.legacy_mode else 1
        steps = range(len(self.decoder_mult) - 1)
        temporal = [first <= step < n_t + first for step in steps]
        if axis == "temporal":
            return temporal
        return [temporal[step] or (step < n_s and n_s > n_t) for step in steps]

    @property
    def decoder_mult(self) -> tuple[int, ...]:
        return self.decoder_channels_mult or self.channels_mult

    @property
    def causal(self) -> bool:
        return self.num_groups == 1

    @property
    def spatial_factor(self) -> int:
        """Input rows per latent row."""
        return self.spatial_compression

    @property
    def time_downsample_factor(self) -> int:
        """Input frames per latent frame; the first latent frame is of one frame."""
        return self.temporal_compression


FSQ_LEVELS = (8, 8, 8, 5, 5, 5)


def _discrete(time: int, space: int, **fields: Any) -> dict[str, Any]:
    return {
        "formulation": "FSQ",
        "levels": FSQ_LEVELS,
        "temporal_compression": time,
        "spatial_compression": space,
        **fields,
    }


def _continuous(time: int, space: int, **fields: Any) -> dict[str, Any]:
    return {
        "formulation": "AE",
        "latent_channels": 16,
        "temporal_compression": time,
        "spatial_compression": space,
        **fields,
    }


_PREDICT1 = {"layout": "predict1"}

# <release>-<C: continuous, D: discrete>V<factors of T, H, W>, as the released models are called. A 4x8x8
# model turns 4 frames of 8x8 pixels into one token. The models called Cosmos-1.0-Tokenizer are the 720p ones
# of predict1.
CosmosConfig.presets = {
    "0.1-DV4x8x8": _discrete(4, 8),
    "0.1-DV8x8x8": _discrete(8, 8),
    "0.1-DV8x16x16": _discrete(8, 16),
    "0.1-CV4x8x8": _continuous(4, 8, decoder_channels_mult=(2, 4)),  # only in this release
    "0.1-CV8x8x8": _continuous(8, 8),
    "0.1-CV8x16x16": _continuous(8, 16),
    "predict1-DV4x8x8-360p": _discrete(4, 8, patch_size=2, z_channels=256, **_PREDICT1),
    "predict1-DV8x16x16-720p": _discrete(8, 16, **_PREDICT1),
    "predict1-CV4x8x8-360p": _continuous(4, 8, patch_size=2, **_PREDICT1),
    "predict1-CV8x8x8-720p": _continuous(8, 8, **_PREDICT1),
    # Not a released model: small enough to train on a laptop, for 17x128x128 clips.
    "tiny": _discrete(
        4, 8, patch_size=2, channels=16, channels_mult=(1, 2, 3), num_res_blocks=1, z_channels=32, **_PREDICT1
    ),
}
