"""Encode and decode a long video chunk by chunk, with memory for one chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.vidtok.blocks import Caches

if TYPE_CHECKING:
    from vtok_fast.models.vidtok.model import VidTok


class VidTokStream:
    """The state of one pass over one video; `VidTok.stream()` makes it. Several may run on one model.

        stream = model.stream()
        for start, end in stream.chunks(num_frames):
            tokens = stream.encode_chunk(video[:, :, start:end])
            part = stream.decode_chunk(tokens)

    Encoding equals that of the whole video if the first chunk has 1 + k * factor frames and each later one
    (version 1.1: but the last) a multiple of the temporal factor. A later chunk of version 1.1 that is not a
    multiple is filled up at its own front.

    Decoding equals that of the whole video with nearest upsampling. Trilinear upsampling (version 1.1) looks
    ahead: give `decode_chunk` the chunk after it as `lookahead`. Then a model of temporal factor 2 is exact,
    and one of 4 or 8 differs by some tenths of a per cent (without, by one to nine per cent): this is how the
    official code streams.

    A chunk that raises leaves the stream as it was. Nothing is kept on the model.
    """

    def __init__(self, model: VidTok):
        if not model.config.causal:
            raise ValueError(
                f"{model.config.name}: a non-causal model cannot stream, its frames depend on later ones"
            )
        self.model = model
        self.factor = model.config.time_downsample_factor
        self.reset()

    def reset(self) -> None:
        """Forget what came before: the next chunk is the first of a video."""
        self._encoded: Caches | None = None
        self._decoded: Caches | None = None

    def chunks(self, frames: int, size: int = 16) -> list[tuple[int, int]]:
        """[start, end) of the chunks of a video: frame 0 alone, then `size` frames each (a multiple of the
        temporal factor)."""
        if size < 1 or size % self.factor:
            raise ValueError(f"size={size} must be a multiple of the temporal factor {self.factor}")
        if frames < 1:
            raise ValueError(f"frames={frames}: a video has at least one")
        return [(0, 1)] + [(start, min(start + size, frames)) for start in range(1, frames, size)]

    @torch.no_grad()
    def encode_chunk(self, video: Tensor) -> Tokens:
        """Tokens of the next frames, (B, C, T, H, W). Errors as for `VidTok.encode`; ValueError also for a
        batch or frame size that differs from the chunk before, and in version 1.0 for a T that breaks the
        rule above."""
        model = self.model
        model.check_video(video)
        check_finite("video", video)
        first, frames = self._encoded is None, video.shape[2]
        if model.config.version == "1.0" and frames % self.factor != (1 if first else 0) % self.factor:
            rule = f"1 + k * {self.factor}" if first else f"a multiple of {self.factor}"
            raise ValueError(
                f"video: a chunk has {frames} frames; the {'first' if first else 'next'} one needs {rule}"
            )
        caches = self._next(self._encoded, "video", (video.shape[0], *video.shape[3:]))
        tokens = model.tokens_of(model.encoder(video, caches), video)
        self._encoded = caches
        return tokens

    @torch.no_grad()
    def decode_chunk(self, tokens: Tokens, *, lookahead: Tokens | None = None) -> Tensor:
        """The frames of the next tokens, as many as were encoded into them.

        Args:
            lookahead: the tokens that follow these ones (their first latent frame is used), None at the end
                of the video.

        Errors as for `VidTok.decode`; ValueError also for a batch or frame size that differs from the chunk
        before.
        """
        model = self.model
        codes = model.codes_of(tokens)
        ahead = {}
        if lookahead is not None:
            codes = torch.cat((codes, model.codes_of(_first_frame(lookahead))), dim=2)
            ahead = model.decoder.lookahead()
        caches = self._next(self._decoded, "tokens", (tokens.batch, *tokens.video_shape[1:]), ahead)
        video = model.decoder(codes, caches)
        self._decoded = caches
        if lookahead is not None:
            video = video[:, :, : -self.factor]
        return video[:, :, -tokens.video_shape[0] :].to(tokens.dtype)

    @staticmethod
    def _next(previous: Caches | None, name: str, size: tuple[int, ...], ahead: dict | None = None) -> Caches:
        if previous is not None and previous.size != size:
            raise ValueError(
                f"{name}: (B, H, W) is {size}, in the chunk before it was {previous.size}; reset() starts a "
                f"new video"
            )
        caches = Caches(previous, ahead)
        caches.size = size
        return caches


def _first_frame(tokens: Tokens) -> Tokens:
    kind = "latents" if tokens.indices is None else "indices"
    return replace(tokens, video_shape=(1, *tokens.video_shape[1:]), **{kind: tokens.data[..., :1, :, :]})
