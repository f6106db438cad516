"""VidTok (arXiv 2412.13061, https://github.com/microsoft/VidTok, MIT) in plain PyTorch: video to tokens and
back.

    model = VidTok.from_checkpoint("vidtok_fsq_causal_488_32768.ckpt", "fsq_causal_488_32768")
    tokens = model.encode(video)         # video (B, 3, T, H, W) in [-1, 1]
    video = model.decode(tokens)

How many frames come back. A factor-4 model makes one latent frame of 4 frames:

- causal, version 1.0: T = 1 + 4k comes back complete. For any other T the decoder's rule of dropping its
  first 3 frames leaves fewer: 8 frames come back as 5, and 6 as 5, as in the official code.
- causal, version 1.1: every T comes back complete; the front is filled up with copies of the first frame.
- non-causal: T = 4k comes back complete, any other T is cut to a multiple of 4.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.regularizers import FSQRegularizer, KLRegularizer
from vtok_fast.models.common.tokenizer import Reconstruction, Tokenizer
from vtok_fast.models.vidtok.config import VidTokConfig
from vtok_fast.models.vidtok.networks import Decoder, Encoder

if TYPE_CHECKING:
    from vtok_fast.models.vidtok.stream import VidTokStream


class VidTok(Tokenizer):
    """A VidTok. State-dict keys are those of the official checkpoints.

    Args:
        config: a name in `CONFIGS` (vtok_fast/models/vidtok/config.py), a `VidTokConfig` or a dict of its
            fields. None: the fields are given as keywords.
        fields: the fields of a `VidTokConfig`, if config is None.

    Raises ValueError for an unknown name or an impossible structure.
    """

    system, Config = "vidtok", VidTokConfig
    _has_warned = False  # of frames that do not come back; for all models of the process

    def __init__(self, config: str | VidTokConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__(config, **fields)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.regularization = _make_regularizer(self.config)
        if self.config.regularizer == "fsq":
            self.codebook_size = self.regularization.codebook_size
        else:
            self.latent_channels = self.config.z_channels

    # Whole videos

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W); differentiable. For a Gaussian latent the mean is used. See
        `encode` for errors."""
        self.check_video(video)
        codes = self.regularization(self.encoder(video)).codes
        return self._decode_codes(codes, video.shape[2])

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also the codes, the indices and the regularizer's loss after `step`
        training steps.

        In training mode a Gaussian latent is sampled, otherwise the mean is used.
        """
        self.check_video(video)
        z = self.encoder(video)
        options = {"sample": self.training} if self.config.regularizer == "kl" else {}
        codes, indices, loss = self.regularization(z, step=step, **options)
        return Reconstruction(self._decode_codes(codes, video.shape[2]), codes, indices, loss)

    @torch.no_grad()
    def encode(self, video: Tensor, *, strict: bool = False) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype. For a Gaussian latent: its mean.

        Where fewer frames will come back (`decoded_frames`), the first call of a program warns; every call
        with `strict` refuses.

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty
        batch, NaN or infinity, and with `strict` for frames that would not come back.
        """
        self.check_video(video)
        check_finite("video", video)
        self._check_frames(video.shape[2], strict)
        return self.tokens_of(self.encoder(video), video)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype (how many frames: see the head of this file). Values are
        not clamped.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another kind of model or
        do not fit their own description.
        """
        return self._decode_codes(self.codes_of(tokens), tokens.video_shape[0]).to(tokens.dtype)

    def stream(self) -> VidTokStream:
        """Encode and decode a video chunk by chunk; see `VidTokStream`. Raises ValueError for a non-causal
        model."""
        from vtok_fast.models.vidtok.stream import VidTokStream

        return VidTokStream(self)

    def decoded_frames(self, frames: int) -> int:
        """How many of a video's frames `decode` gives back: see the head of this file."""
        factor, config = self.config.time_downsample_factor, self.config
        if config.causal and config.version == "1.1":
            return frames
        latent = self.latent_shape(frames, 0, 0)[0]
        return min(frames, latent * factor - (factor - 1 if config.causal else 0))

    def _check_frames(self, frames: int, strict: bool) -> None:
        back = self.decoded_frames(frames)
        if back == frames or (self._has_warned and not strict):
            return
        rule = f"{'1 + ' if self.config.causal else ''}{self.config.time_downsample_factor} k"
        message = (
            f"video: of its {frames} frames, {back} come back from decode; this model keeps {rule} frames"
        )
        if strict:
            raise ValueError(message)
        VidTok._has_warned = True
        warnings.warn(message, stacklevel=4)  # encode, and no_grad around it

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of that size: one token each (a latent position, for a Gaussian latent)."""
        factor = self.config.time_downsample_factor
        if self.config.causal and frames % factor:
            frames += factor - 1  # version 1.1 adds fewer; the quotient is the same
        return frames // factor, height // self.config.spatial_factor, width // self.config.spatial_factor

    token_grid = latent_shape

    # What the above is made of

    def tokens_of(self, z: Tensor, video: Tensor) -> Tokens:
        """The tokens of what the encoder made of a video."""
        codes, indices, _ = self.regularization(z)
        return self.make_tokens(video, indices=indices, latents=codes if indices is None else None)

    def codes_of(self, tokens: Tokens) -> Tensor:
        """The latent that the decoder takes, of checked tokens."""
        data = self.check_tokens(tokens)
        return data if tokens.indices is None else self.regularization.decode(data, self.parameter.dtype)

    def _decode_codes(self, codes: Tensor, frames: int) -> Tensor:
        video = self.decoder(codes)
        return video[:, :, -frames:] if video.shape[2] > frames else video


def _make_regularizer(config: VidTokConfig) -> nn.Module:
    if config.regularizer == "kl":
        return KLRegularizer()
    return FSQRegularizer(
        config.levels,
        entropy_loss_weight=config.entropy_loss_weight,
        entropy_loss_annealing_steps=config.entropy_loss_annealing_steps,
        entropy_loss_annealing_factor=config.entropy_loss_annealing_factor,
        commitment_loss_weight=config.commitment_loss_weight,
        diversity_gamma=config.diversity_gamma,
    )
