"""What a VTok is made of, and some by name (arXiv 2602.04202)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vtok_fast.models.common.tokenizer import Config


@dataclass(frozen=True)
class VTokConfig(Config):
    """The structure of one VTok.

    The paper states: a frozen CLIP-L/336 for the key frame and for the residuals, 16 tokens (4x4) for the key
    frame, which is the first one, and one token for each residual. Inferred, because the paper does not say:
    key_pool, the inside of the residual head (mean over patches, then an MLP of motion_layers), stride, and
    the token's dimension. The decoder is this package's own.

    Attributes:
        backbone: "vit" (a ViT of this package, of dim, depth and heads below) or "external" (a module given
            to `VTok`).
        feature_dim: channels of the backbone's features; for "vit" it is dim.
        freeze_backbone: whether the backbone does not learn.
        key_grid: rows and columns of the key frame's tokens.
        key_pool: how its features are pooled into them, "average" or "max".
        stride: frames from one residual token to the next. A clip of T frames has (T - 1) // stride of them.
        token_dim: channels of a token. If it is not feature_dim, the key frame's features pass a linear
            layer.
        motion_layers, motion_hidden: linear layers of the residual head, with GELU between them, and their
            width.
        patch: rows and columns of a patch of the "vit" and of the decoder.
        decoder_dim, decoder_depth, decoder_heads, mlp_ratio: of the decoder.
        nearby: initial bias of the decoder's queries and keys that makes attention fall off with distance
            (see `look_nearby`).
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "clip_l_336": {
            "backbone": "external",
            "feature_dim": 1024,
            "token_dim": 1024,
            "motion_hidden": 1024,
            "patch": 16,
        },
        # Not of the paper: small enough to train on a laptop, for 16x64x64 clips.
        "tiny": {
            "dim": 96,
            "depth": 2,
            "heads": 3,
            "freeze_backbone": False,
            "token_dim": 64,
            "motion_hidden": 128,
            "decoder_dim": 96,
            "decoder_depth": 3,
            "decoder_heads": 3,
            "nearby": 2.0,
        },
    }

    in_channels: int = 3
    backbone: str = "vit"
    dim: int = 384
    depth: int = 6
    heads: int = 6
    feature_dim: int | None = None
    freeze_backbone: bool = True
    key_grid: tuple[int, int] = (4, 4)
    key_pool: str = "average"
    stride: int = 1
    token_dim: int = 384
    motion_layers: int = 2
    motion_hidden: int = 384
    patch: int = 8
    decoder_dim: int = 384
    decoder_depth: int = 6
    decoder_heads: int = 6
    mlp_ratio: float = 4.0
    nearby: float = 0.0

    def __post_init__(self) -> None:
        self.set_tuples("key_grid")
        self.need_one_of("backbone", "vit", "external")
        self.need_one_of("key_pool", "average", "max")
        if self.feature_dim is None:
            if self.backbone == "external":
                raise ValueError("feature_dim=None: an external backbone needs the number of its channels")
            object.__setattr__(self, "feature_dim", self.dim)
        self.need_at_least(
            1,
            "in_channels",
            "dim",
            "depth",
            "heads",
            "feature_dim",
            "stride",
            "token_dim",
            "motion_layers",
            "motion_hidden",
            "patch",
            "decoder_dim",
            "decoder_depth",
            "decoder_heads",
        )
        if self.backbone == "vit" and self.feature_dim != self.dim:
            raise ValueError(
                f"feature_dim={self.feature_dim}: the features of the vit are those of dim={self.dim}"
            )
        if len(self.key_grid) != 2 or min(self.key_grid) < 1:
            raise ValueError(f"key_grid={self.key_grid} must be (rows, columns)")
        for dim, heads in (("dim", "heads"), ("decoder_dim", "decoder_heads")):
            size = getattr(self, dim) // getattr(self, heads)
            if getattr(self, dim) % getattr(self, heads) or size % 2 or size < 4:
                raise ValueError(
                    f"{heads}={getattr(self, heads)} must cut {dim}={getattr(self, dim)} into heads of an "
                    f"even "
                    "size of at least 4, for two axes"
                )

    @property
    def key_tokens(self) -> int:
        return self.key_grid[0] * self.key_grid[1]

    @property
    def spatial_factor(self) -> int:
        return self.patch

    # For `check_video`: any number of frames is taken.
    time_downsample_factor: ClassVar[int] = 1
    causal: ClassVar[bool] = False
