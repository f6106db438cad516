"""The Cosmos video tokenizers (https://github.com/NVIDIA/Cosmos-Tokenizer, Apache-2.0) in plain PyTorch:
video to tokens and back.

    model = Cosmos.from_checkpoint("model.pt", "predict1-DV8x16x16-720p")
    tokens = model.encode(video)         # video (B, 3, T, H, W) in [-1, 1]
    video = model.decode(tokens)

Every video comes back complete: one of 1 + k * temporal_compression frames as it is, any other filled up
behind with copies of its last frame and cut again, as the official programs do. A frame depends on no later
one (beyond its own group), but on all earlier ones, because of the attention over time: so there is no exact
streaming in bounded memory, and `stream` works
    in windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.regularizers import KLRegularizer
from vtok_fast.models.common.tokenizer import Reconstruction, Tokenizer
from vtok_fast.models.common.windows import WindowStream
from vtok_fast.models.cosmos.blocks import POINT, CausalConv3d
from vtok_fast.models.cosmos.checkpoint import fit_constants, read_cosmos
from vtok_fast.models.cosmos.config import CosmosConfig
from vtok_fast.models.cosmos.networks import Decoder, Encoder
from vtok_fast.models.cosmos.quantizers import FSQuantizer, Identity


class CosmosBase(Tokenizer):
    """What Cosmos and the tokenizers built on it share: networks, bottleneck, sizes and files."""

    def make_networks(self, config: CosmosConfig) -> None:
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        moments = 2 if config.formulation == "VAE" else 1
        self.quant_conv = CausalConv3d(
            config.z_channels * config.z_factor, config.latent_channels * moments, POINT
        )
        self.post_quant_conv = CausalConv3d(config.latent_channels, config.z_channels, POINT)
        if config.formulation == "FSQ":
            self.quantizer = FSQuantizer(config.levels, constants=config.layout == "predict1")
            self.codebook_size = self.quantizer.codebook_size
        else:
            self.distribution = KLRegularizer() if config.formulation == "VAE" else Identity()
            self.latent_channels = config.latent_channels

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of that size."""
        factor = self.config.spatial_factor
        return 1 - (1 - frames) // self.config.time_downsample_factor, height // factor, width // factor

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        return read_cosmos(path)

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_constants(weights, self.state_dict())

    def fill_up(self, video: Tensor) -> Tensor:
        """The video with copies of its last frame appended, up to 1 + k * temporal_compression frames."""
        missing = (1 - video.shape[2]) % self.config.time_downsample_factor
        return (
            torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else video
        )

    def codes_of(self, data: Tensor) -> Tensor:
        """The latent that the decoder takes, of indices or latents."""
        return self.quantizer.decode(data, self.parameter.dtype) if self.config.formulation == "FSQ" else data


class Cosmos(CosmosBase):
    """A Cosmos video tokenizer. State-dict keys are those of the official models.

    Args:
        config: a name in `CosmosConfig.presets`, a `CosmosConfig`, a dict of its fields, or None:
        fields: the fields of a `CosmosConfig` (with config=None).

    Raises ValueError for an unknown name or an impossible structure.
    """

    system = "cosmos"
    Config = CosmosConfig

    def __init__(self, config: str | CosmosConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__(config, **fields)
        self.make_networks(self.config)

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W); differentiable. For a Gaussian latent the mean is used. See
        `encode` for errors."""
        self.check_video(video)
        return self._decode(self._bottleneck(self._encode(video)).codes, video.shape[2])

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also codes, indices and the bottleneck's loss (zero for FSQ and AE, the KL
        divergence for VAE).

        In training mode a Gaussian latent is sampled, otherwise the mean is used.
        """
        self.check_video(video)
        options = {"sample": self.training} if self.config.formulation == "VAE" else {}
        codes, indices, loss = self._bottleneck(self._encode(video), step=step, **options)
        return Reconstruction(self._decode(codes, video.shape[2]), codes, indices, loss)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype: indices, or latents (for a VAE:
        the mean).

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty
        batch, NaN or infinity.
        """
        self.check_video(video)
        check_finite("video", video)
        codes, indices, _ = self._bottleneck(self._encode(video))
        return self.make_tokens(video, indices=indices, latents=codes if indices is None else None)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype. Values are not clamped.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        return self._decode(self.codes_of(self.check_tokens(tokens)), tokens.video_shape[0]).to(tokens.dtype)

    def stream(self, size: int = 17, overlap: int = 0) -> WindowStream:
        """Encode and decode a long video in windows of `size` frames, by default independent ones, as the
        official program does."""
        return WindowStream(self, size, overlap)

    @property
    def _bottleneck(self) -> Any:
        return self.quantizer if self.config.formulation == "FSQ" else self.distribution

    def _encode(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(self.fill_up(video)))

    def _decode(self, codes: Tensor, frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))[:, :, :frames]
