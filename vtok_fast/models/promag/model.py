"""ProMAG (arXiv 2501.05442): a video tokenizer of 4x compression in time that is grown to 8x and to 16x.

    model = ProMAG("4x_8chn")             # train it, then
    model = model.grow()                  # "8x_8chn", of which the new parts are trained
    tokens = model.encode(video)          # video (B, 3, T, H, W) in [-1, 1]
    video = model.decode(tokens)

A grown model encodes the video with the lower model's frozen encoder twice: all frames, f, and every second
one, k. Its features are k + r, with r made from f modulated by k. The decoder first doubles the frames, then
goes on as the lower one. A model of 16x is the same once more; the lower encoders run once on every frame
rate, not once for each path through them.

A video is cut into chunks of 17 frames that overlap by 4 and are blended in pixels; the last chunk is filled
up with copies of the last frame to 1 + k * factor. The chunks' latents lie one after the other in time.
Causal convolutions see no later frame, but the norms' statistics are those of a whole chunk (unless
per_frame).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.regularizers import KLRegularizer
from vtok_fast.models.common.tokenizer import Reconstruction, Tokenizer
from vtok_fast.models.common.windows import WindowStream, blend_weights
from vtok_fast.models.promag.blocks import CausalConv3d, Decoder, DecoderGrowth, Encoder, EncoderGrowth
from vtok_fast.models.promag.config import ProMAGConfig


class ProMAG(Tokenizer):
    """A ProMAG.

    Args:
        config: a name in `ProMAGConfig.presets`, a `ProMAGConfig`, a dict of its fields, or None:
        fields: the fields of a `ProMAGConfig` (with config=None).

    Raises ValueError for an unknown name or an impossible structure.
    """

    system, Config = "promag", ProMAGConfig

    def __init__(self, config: str | ProMAGConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        channels = c.ch * c.ch_mult[-1]
        self.latent_channels = c.z_channels
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.encoder_growth = nn.ModuleList(EncoderGrowth(c) for _ in range(c.growth))
        self.decoder_growth = nn.ModuleList(DecoderGrowth(c) for _ in range(c.growth))
        self.to_latent = nn.Conv3d(channels, 2 * c.z_channels, 1)
        self.from_latent = nn.Conv3d(c.z_channels, channels, 1)
        self.regularization = KLRegularizer()
        if c.growth and c.freeze_lower:
            for part in (self.encoder, *self.encoder_growth[:-1], *self.decoder.full_resolution()):
                part.requires_grad_(False)

    def grow(self) -> ProMAG:
        """A model of twice the compression in time, with copies of this one's parameters.

        Before it has learnt anything it encodes every second frame as this model does, and decodes each
        latent frame but the first one twice in a row.

        Raises ValueError if a chunk of the grown model would not be 1 + k * factor frames.
        """
        config = replace(self.config, growth=self.config.growth + 1)
        named = (name for name, preset in ProMAGConfig.presets.items() if ProMAGConfig(**preset) == config)
        grown = ProMAG(replace(config, name=next(named, "custom")))
        grown.load_state_dict(self.state_dict(), strict=False)
        return grown.to(self.parameter.device, self.parameter.dtype).train(self.training)

    def tiling(self, tile: int | None) -> ProMAG:
        """Let every layer work in squares of `tile` positions (None: on whole frames), and return the model.
        The results are equal.

        This bounds what the layers of this plain model need beside their inputs and outputs; accelerated ones
        make no padded copies, and work on whole frames.
        """
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile={tile!r} must be at least 1, or None")
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.tile = tile
        return self

    # Whole videos

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W) from the mean of its latent; differentiable. Errors as for
        `encode`."""
        self.check_video(video)
        parts = [
            self.decode_latent(self.regularization(self.encode_latent(part)).codes)
            for part in self._chunks(video)
        ]
        return self._blend(parts, video.shape[2])

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also the codes and the KL loss. In training mode the latent is sampled,
        otherwise its mean."""
        self.check_video(video)
        results = [
            self.regularization(self.encode_latent(part), step=step, sample=self.training)
            for part in self._chunks(video)
        ]
        y = self._blend([self.decode_latent(result.codes) for result in results], video.shape[2])
        codes = torch.cat([result.codes for result in results], dim=2)
        return Reconstruction(y, codes, None, sum(result.loss for result in results))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype: the means of the latent (B,
        z_channels, t, h, w).

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty
        batch, NaN or infinity.
        """
        self.check_video(video)
        check_finite("video", video)
        codes = [self.regularization(self.encode_latent(part)).codes for part in self._chunks(video)]
        return self.make_tokens(video, latents=torch.cat(codes, dim=2))

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype. Values are not clamped.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        codes, frames = self.check_tokens(tokens), tokens.video_shape[0]
        parts = codes.split([latents for _, _, latents in self.plan(frames)], dim=2)
        return self._blend([self.decode_latent(part) for part in parts], frames).to(tokens.dtype)

    def stream(self) -> WindowStream:
        """Encode and decode a video chunk by chunk, as `encode` and `decode` do, in the memory of one; see
        `WindowStream`.

        Raises ValueError for a model that does not cut videos into chunks.
        """
        if self.config.chunk_frames is None:
            raise ValueError("chunk_frames=None: this model takes a video as a whole")
        return WindowStream(self, self.config.chunk_frames, self.config.overlap)

    @property
    def window(self) -> tuple[int, int]:
        c = self.config
        return super().window if c.chunk_frames is None else (c.chunk_frames, c.overlap)

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of that size; t counts the latent frames of all chunks."""
        factor = self.config.spatial_factor
        return sum(latents for _, _, latents in self.plan(frames)), height // factor, width // factor

    def plan(self, frames: int) -> list[tuple[int, int, int]]:
        """(first frame, frame after the last one, latent frames) of each chunk of a video."""
        c = self.config
        size = c.chunk_frames or frames
        overlap = 0 if c.chunk_frames is None else c.overlap
        spans = [
            (start, min(start + size, frames)) for start in range(0, max(frames - overlap, 1), size - overlap)
        ]
        return [(start, end, 1 - (start + 1 - end) // c.time_downsample_factor) for start, end in spans]

    # Chunks

    def encode_latent(self, chunk: Tensor) -> Tensor:
        """Mean and log-variance (B, 2 z_channels, 1 + k, h, w) of a chunk (B, C, 1 + k * factor, H, W)."""
        rates = [self.encoder(chunk[:, :, :: 2**i]) for i in range(self.config.growth + 1)]
        for stage in self.encoder_growth:
            rates = [stage(f, k) for f, k in pairwise(rates)]
        return self.to_latent(rates[0])

    def decode_latent(self, codes: Tensor) -> Tensor:
        """The chunk (B, C, 1 + k * factor, H, W) of codes (B, z_channels, 1 + k, h, w)."""
        x = self.from_latent(codes)
        for stage in reversed(self.decoder_growth):
            x = stage(x)
        return self.decoder(x)

    def _chunks(self, video: Tensor) -> list[Tensor]:
        """The chunks of a video, each filled up to 1 + k * factor frames."""
        parts = []
        for start, end, latents in self.plan(video.shape[2]):
            part, missing = (
                video[:, :, start:end],
                1 + (latents - 1) * self.config.time_downsample_factor - (end - start),
            )
            parts.append(
                torch.cat((part, part[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else part
            )
        return parts

    def _blend(self, parts: list[Tensor], frames: int) -> Tensor:
        """One video of decoded chunks: the frames that two of them share fade from one to the other."""
        pieces, held = [], None
        for part, (start, end, _) in zip(parts, self.plan(frames), strict=True):
            part = part[:, :, : end - start]
            if held is not None and (n := held.shape[2]):
                weight = blend_weights(n, part)
                part = torch.cat((weight * held + (1 - weight) * part[:, :, :n], part[:, :, n:]), dim=2)
            keep = part.shape[2] - (self.config.overlap if end < frames else 0)
            pieces.append(part[:, :, :keep])
            held = part[:, :, keep:]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
