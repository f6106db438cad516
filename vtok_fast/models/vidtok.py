"""VidTok (arXiv 2412.13061, https://github.com/microsoft/VidTok, MIT) in plain PyTorch: video to tokens and back.

    model = VidTok.from_checkpoint("vidtok_fsq_causal_488_32768.ckpt", "fsq_causal_488_32768")
    tokens = model.encode(video)         # video (B, 3, T, H, W) in [-1, 1]
    video = model.decode(tokens)

How many frames come back. A factor-4 model makes one latent frame of 4 frames:

- causal, version 1.0: T = 1 + 4k comes back complete. For any other T the decoder's rule of dropping its first 3 frames leaves
  fewer: 8 frames come back as 5, and 6 as 5, as in the official code.
- causal, version 1.1: every T comes back complete; the front is filled up with copies of the first frame.
- non-causal: T = 4k comes back complete, any other T is cut to a multiple of 4.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtok_fast.models.vidtok_checkpoint import METADATA_KEY, check_weights, read_weights
from vtok_fast.models.vidtok_checks import check_finite, check_video
from vtok_fast.models.vidtok_configs import VidTokConfig, get_config
from vtok_fast.models.vidtok_networks import Decoder, Encoder
from vtok_fast.models.vidtok_regularizers import FSQRegularizer, KLRegularizer
from vtok_fast.tokens import Tokens, write_atomically

SYSTEM = "vidtok"


class Reconstruction(NamedTuple):
    """`video` like the input, `codes` (B, z, t, h, w) the latent behind the regulariser, `indices` (B, t, h, w) int32 (fsq only),
    `loss` the regulariser's training loss, a scalar."""

    video: Tensor
    codes: Tensor
    indices: Tensor | None
    loss: Tensor


class VidTok(nn.Module):
    """A VidTok. State-dict keys are those of the official checkpoints.

    Args:
        config: a name in `vidtok_configs.CONFIGS`, a `VidTokConfig`, a dict of its fields, or None:
        fields: the fields of a `VidTokConfig` (with config=None).

    Raises ValueError for an unknown name or an impossible structure.
    """

    system = SYSTEM

    def __init__(self, config: str | VidTokConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__()
        if config is not None and fields:
            raise ValueError(f"config={config!r}: give a configuration or its fields ({', '.join(fields)}), not both")
        self.config = get_config(fields if config is None else config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.regularization = _make_regularizer(self.config)

    # Whole videos

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W); differentiable. For a Gaussian latent the mean is used. See `encode` for errors."""
        self._check_video(video)
        codes = self.regularization(self.encoder(video)).codes
        return self._decode_codes(codes, video.shape[2])

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also the codes, the indices and the regulariser's loss after `step` training steps.

        In training mode a Gaussian latent is sampled, otherwise the mean is used.
        """
        self._check_video(video)
        z = self.encoder(video)
        options = {"sample": self.training} if self.config.regularizer == "kl" else {}
        codes, indices, loss = self.regularization(z, step=step, **options)
        return Reconstruction(self._decode_codes(codes, video.shape[2]), codes, indices, loss)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype. For a Gaussian latent: its mean.

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty batch, NaN or infinity.
        """
        self._check_video(video)
        check_finite("video", video)
        return self._tokens(self.encoder(video), video)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype (how many frames: see the head of this file). Values are not clamped.

        Raises TypeError if tokens are none, ValueError if they come from another kind of model or do not fit their own description.
        """
        return self._decode_codes(self._codes(tokens), tokens.video_shape[0]).to(tokens.dtype)

    def stream(self):
        """Encode and decode a video chunk by chunk; see `VidTokStream`. Raises ValueError for a non-causal model."""
        from vtok_fast.models.vidtok_stream import VidTokStream

        return VidTokStream(self)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of that size."""
        factor = self.config.time_downsample_factor
        if self.config.causal and frames % factor:
            frames += factor - 1  # version 1.1 adds fewer; the quotient is the same
        return frames // factor, height // self.config.spatial_factor, width // self.config.spatial_factor

    def num_tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of one video of that size (latent positions, for a Gaussian latent)."""
        t, h, w = self.latent_shape(frames, height, width)
        return t * h * w

    # Files

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        config: str | VidTokConfig | dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> VidTok:
        """Load an official checkpoint (.ckpt; its `loss.*` entries are ignored), a plain state dict, or a .safetensors file.

        Args:
            config: as for `VidTok`; may be left out for a file that `save` wrote.
            dtype: of the parameters.

        Raises FileNotFoundError; ValueError for a file that is truncated, needs a config, or does not fit it (the keys are named).
        """
        path = Path(path)
        weights, stored = read_weights(path)
        if config is None and stored is None:
            raise ValueError(f"config: {path} does not say what model it holds, name one")
        config = get_config(stored if config is None else config)
        with torch.device("meta"):
            model = cls(config)
        model.regularization = _make_regularizer(config)  # its constants are in no checkpoint
        check_weights(path, config.name, weights, model.state_dict())
        model.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
        return model

    def save(self, path: str | os.PathLike) -> None:
        """Write the parameters and the configuration as safetensors; the file appears under its name once it is complete.

        Raises OSError if it cannot be written.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        metadata = {METADATA_KEY: json.dumps(self.config.to_dict())}
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))

    # What the above is made of

    def _tokens(self, z: Tensor, video: Tensor) -> Tokens:
        codes, indices, _ = self.regularization(z)
        return Tokens(
            model=f"{SYSTEM}/{self.config.name}",
            config=self.config.to_dict(),
            video_shape=(video.shape[2], video.shape[3], video.shape[4]),
            dtype=video.dtype,
            indices=indices,
            latents=codes if indices is None else None,
        )

    def _codes(self, tokens: Tokens) -> Tensor:
        """Check tokens, and give the latent that the decoder takes."""
        if not isinstance(tokens, Tokens):
            raise TypeError(f"tokens must be Tokens, not {type(tokens).__name__}")
        if not tokens.model.startswith(f"{SYSTEM}/") or VidTokConfig.from_dict(tokens.config) != self.config:
            raise ValueError(f"tokens come from a {tokens.model!r} model, this one is '{SYSTEM}/{self.config.name}'")
        expected = self.latent_shape(*tokens.video_shape)
        if tokens.grid != expected:
            raise ValueError(f"tokens have {tokens.grid} positions, a video of {tokens.video_shape} has {expected}")
        parameter = next(self.parameters())
        if tokens.indices is None:
            if tokens.latents.shape[1] != self.config.z_channels:
                raise ValueError(f"tokens.latents have {tokens.latents.shape[1]} channels, the model has {self.config.z_channels}")
            check_finite("tokens.latents", tokens.latents)
            return tokens.latents.to(parameter.device, parameter.dtype)
        size = self.regularization.codebook_size
        if tokens.indices.numel() and not 0 <= tokens.indices.min() <= tokens.indices.max() < size:
            raise ValueError(f"tokens.indices lie in [{tokens.indices.min()}, {tokens.indices.max()}], the codebook has {size} "
                             "entries")
        return self.regularization.decode(tokens.indices.to(parameter.device), parameter.dtype)

    def _decode_codes(self, codes: Tensor, frames: int) -> Tensor:
        video = self.decoder(codes)
        return video[:, :, -frames:] if video.shape[2] > frames else video

    def _check_video(self, video: Tensor) -> None:
        check_video(video, self.config, next(self.parameters()))


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
