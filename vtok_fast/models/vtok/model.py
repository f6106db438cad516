"""VTok (arXiv 2602.04202): the key frame's tokens, and one residual token for each later frame: T + S tokens
instead of T * S.

    clip = CLIPVisionModel.from_pretrained("openai/clip-vit-large-patch14-336")
    model = VTok("clip_l_336", backbone=CLIPBackbone(clip))
    tokens = model.encode(video)      # video (B, 3, T, H, W) in [-1, 1]
    embeds = model.sequence(tokens)   # (B, 16 + (T - 1) // stride, token_dim), for a language model

With features F(x) of a frame's patches, the key frame's tokens are F(x_1) averaged to a small grid, and the
token of frame t is g(mean(F(x_t) - F(x_1))) with g an MLP. The mean is linear, so it is computed as mean
F(x_t) - mean F(x_1): of each frame one vector is kept, not its features.

The paper decodes with a language model and a frozen video diffusion model. Here a small ViT makes each frame
from the key frame's tokens and its residual token, so that the tokens can be inspected, and trained by
reconstruction. With a stride above 1 the residual tokens of the frames between are interpolated, and frames
after the last residual token use that one. The key frame's own residual token is g(0).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.tokenizer import Reconstruction, Tokenizer
from vtok_fast.models.common.transformer import (
    Transformer,
    grid_centers,
    init_vit,
    look_nearby,
    split_head,
    unpatchify,
)
from vtok_fast.models.common.windows import WindowStream
from vtok_fast.models.vtok.backbones import ViT, feature_map, plane_angles
from vtok_fast.models.vtok.config import VTokConfig

FRAMES_AT_ONCE = 16  # of each video of the batch; it bounds the memory


class VTok(Tokenizer):
    """A VTok.

    Args:
        config: a name in `VTokConfig.presets`, a `VTokConfig`, a dict of its fields, or None:
        backbone: with a configuration whose backbone is "external": what maps frames to patch features (see
            `vtok_backbones`). It is not saved with the model, and must be given to `from_checkpoint` too.
        fields: the fields of a `VTokConfig` (with config=None).

    Raises ValueError for an unknown name, an impossible structure, or a backbone that is missing or not
    wanted.
    """

    system, Config = "vtok", VTokConfig

    def __init__(
        self,
        config: str | VTokConfig | dict[str, Any] | None = None,
        *,
        backbone: nn.Module | None = None,
        **fields: Any,
    ):
        if backbone is not None and config is None:
            fields = {"backbone": "external", **fields}
        super().__init__(config, **fields)
        c = self.config
        if c.backbone == "external" and backbone is None:
            raise ValueError(
                f"backbone: the configuration {c.name!r} wants a module of yours, which the command line "
                f"cannot take; "
                "in Python: VTok.from_checkpoint(file, config, backbone=module), then "
                "vtok_fast.commands.tokenize.tokenize"
            )
        if c.backbone != "external" and backbone is not None:
            raise ValueError(
                f"backbone={type(backbone).__name__}: the configuration {c.name!r} wants {c.backbone!r}"
            )
        self.latent_channels = c.token_dim
        widths = [c.feature_dim, *[c.motion_hidden] * (c.motion_layers - 1), c.token_dim]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
        self.motion = nn.Sequential(*layers[:-1])
        self.key = nn.Linear(c.feature_dim, c.token_dim) if c.feature_dim != c.token_dim else nn.Identity()
        self.decoder = Decoder(c)
        self.apply(init_vit)
        if c.nearby:
            look_nearby(
                self.decoder.transformer, split_head(c.decoder_dim // c.decoder_heads, 2), (0, 1), c.nearby
            )
        if backbone is None:
            backbone = ViT(c.in_channels, c.patch, c.dim, c.depth, c.heads, c.mlp_ratio).apply(init_vit)
        self.backbone = backbone
        if c.freeze_backbone:
            self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VTok:
        super().train(mode)
        if self.config.freeze_backbone:
            self.backbone.eval()
        return self

    def own_state(self) -> dict[str, Tensor]:
        """The state dict, without an external backbone."""
        external = self.config.backbone == "external"
        return {
            key: value
            for key, value in self.state_dict().items()
            if not (external and key.startswith("backbone."))
        }

    @property
    def parameter(self) -> Tensor:
        return self.motion[0].weight

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W); differentiable. Errors as for `encode`."""
        self.check_video(video)
        return self.decoder(*self._tokens(video), self.still(), *video.shape[2:])

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also the codes (B, token_dim, 1, 1, N); there is no quantizer, so the loss
        is 0."""
        self.check_video(video)
        key, motion = self._tokens(video)
        codes = torch.cat((key, motion), dim=1).mT[:, :, None, None]
        return Reconstruction(
            self.decoder(key, motion, self.still(), *video.shape[2:]), codes, None, codes.new_zeros(())
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype: latents (B, token_dim, 1, 1, N),
        key frame first.

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty
        batch, NaN or infinity, or features of a wrong shape.
        """
        self.check_video(video)
        check_finite("video", video)
        return self.make_tokens(
            video, latents=torch.cat(self._tokens(video), dim=1).mT[:, :, None, None].contiguous()
        )

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype. Values are not clamped.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        row, n = self.check_tokens(tokens)[:, :, 0, 0].mT, self.config.key_tokens
        return self.decoder(row[:, :n], row[:, n:], self.still(), *tokens.video_shape).to(tokens.dtype)

    def sequence(self, tokens: Tokens) -> Tensor:
        """The tokens as a sequence (B, N, token_dim) for a language model, on the model's device. Errors as
        for `decode`."""
        return self.check_tokens(tokens)[:, :, 0, 0].mT

    def stream(self, frames: int = 16) -> WindowStream:
        """Encode and decode a video in windows of `frames`, each with a key frame of its own."""
        return WindowStream(self, frames)

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(1, 1, N): the tokens lie in a row, and their number does not depend on the frame size."""
        return 1, 1, self.config.key_tokens + (frames - 1) // self.config.stride

    def still(self) -> Tensor:
        """The residual token of the key frame itself, (token_dim)."""
        return self.motion(self.parameter.new_zeros(self.config.feature_dim))

    def features(self, frames: Tensor) -> Tensor:
        """(N, feature_dim, h, w) of frames (N, C, H, W)."""
        features = feature_map(self.backbone(frames))
        if features.shape[1] != self.config.feature_dim:
            raise ValueError(
                f"backbone: features have {features.shape[1]} channels, the configuration says "
                f"{self.config.feature_dim}"
            )
        return features

    def _tokens(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Key tokens (B, key_tokens, token_dim) and residual tokens (B, R, token_dim)."""
        frames = video[:, :, :: self.config.stride].transpose(1, 2)
        first = self.features(frames[:, 0])
        pool = F.adaptive_avg_pool2d if self.config.key_pool == "average" else F.adaptive_max_pool2d
        pooled = pool(first, self.config.key_grid).flatten(2).mT
        means = [
            self.features(part.flatten(0, 1)).mean((2, 3)).unflatten(0, (-1, part.shape[1]))
            for part in frames[:, 1:].split(FRAMES_AT_ONCE, dim=1)
            if part.shape[1]
        ]
        key_mean = first.mean((2, 3)).unsqueeze(1)
        residual = torch.cat(means, dim=1) - key_mean if means else key_mean[:, :0]
        return self.key(pooled), self.motion(residual)


class Decoder(nn.Module):
    """Frame t from the key frame's tokens and its residual token: a ViT on [patch queries, key tokens,
    residual token].

    This package's own, not the paper's. The patch queries are one learned token, told apart by rotary
    positions; the key frame's tokens stand at the centers of the cells that they were pooled from, the
    residual token has no place.
    """

    def __init__(self, config: VTokConfig):
        super().__init__()
        self.config = config
        self.from_token = nn.Linear(config.token_dim, config.decoder_dim)
        self.token_embedding = nn.Parameter(0.02 * torch.randn(config.key_tokens + 1, config.decoder_dim))
        self.patch_query = nn.Parameter(0.02 * torch.randn(config.decoder_dim))
        self.transformer = Transformer(
            config.decoder_dim, config.decoder_depth, config.decoder_heads, config.mlp_ratio
        )
        self.to_pixels = nn.Linear(config.decoder_dim, config.in_channels * config.patch**2)

    def forward(
        self, key: Tensor, motion: Tensor, still: Tensor, frames: int, height: int, width: int
    ) -> Tensor:
        motion = torch.cat((still.to(motion.dtype).expand(motion.shape[0], 1, -1), motion), dim=1)
        motion = at_frames(motion, frames, self.config.stride)
        parts = [self.some_frames(key, part, height, width) for part in motion.split(FRAMES_AT_ONCE, dim=1)]
        return torch.cat(parts, dim=2)

    def some_frames(self, key: Tensor, motion: Tensor, height: int, width: int) -> Tensor:
        c, (b, n) = self.config, motion.shape[:2]
        rows, columns = height // c.patch, width // c.patch
        tokens = torch.cat((key.unsqueeze(1).expand(-1, n, -1, -1), motion.unsqueeze(2)), dim=2).flatten(0, 1)
        tokens = self.from_token(tokens) + self.token_embedding.to(tokens.dtype)
        queries = self.patch_query.to(tokens.dtype).expand(b * n, rows * columns, -1)
        places = torch.cat(
            [grid_centers(shape, rows, columns, tokens.device) for shape in ((rows, columns), c.key_grid)]
        )
        angles = F.pad(plane_angles(places, c.decoder_dim // c.decoder_heads), (0, 0, 0, 1))
        x = self.transformer(torch.cat((queries, tokens), dim=1), angles)
        patches = self.to_pixels(x[:, : rows * columns])
        return (
            unpatchify(patches, (1, c.patch, c.patch), (1, height, width))
            .unflatten(0, (b, n))
            .squeeze(3)
            .transpose(1, 2)
        )


def at_frames(motion: Tensor, frames: int, stride: int) -> Tensor:
    """Residual tokens (B, R + 1, C) of frames 0, stride, 2 stride, ... at every frame, (B, frames, C):
    interpolated, then held."""
    if stride == 1:
        return motion
    t = torch.arange(frames, device=motion.device)
    last = motion.shape[1] - 1
    before = (t // stride).clamp(max=last)
    share = torch.where(before == last, 0, t % stride).to(motion.dtype) / stride
    return torch.lerp(motion[:, before], motion[:, (before + 1).clamp(max=last)], share[:, None])
