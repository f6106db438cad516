"""What a TivTok is made of, and the paper's sizes by name (arXiv 2606.17590)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vtok_fast.models.common.tokenizer import Config
from vtok_fast.models.common.transformer import split_head


@dataclass(frozen=True)
class TivTokConfig(Config):
    """The structure of one TivTok. A *slice* is the patches of patch[0] frames, a *chunk* the slices of
    `frames` frames.

    The paper states: patch, dim, depth, frames, the total tokens and their dimension, a rotary embedding over
    three axes. The split into 3/4 invariant and 1/4 variant tokens follows from its token counts, SoftVQ from
    the name of its backbone. Inferred, because the paper does not say: heads, rotary_split, tiv_position,
    tv_position, nearby, decoder_time, query_grid, patch_scope, the quantizer's options, merge, that a short
    last chunk counts in the mean like a whole one, that in the decoder every token sees every other one of
    its slice, and that its "t" is a slice of tv tokens (tv/4 for each raw frame would give the same tokens).

    Attributes:
        frames: of a chunk.
        patch: frames, rows and columns of a patch; rows and columns are equal.
        dim, depth, heads, mlp_ratio: of the encoder and of the decoder.
        tiv, tv: time-invariant tokens of a chunk, time-variant tokens of a slice.
        latent_dim: channels of a token.
        rotary_split: channels of a head that are rotated by t, h and w; None: split evenly.
        tiv_position: positions of the invariant tokens, in the decoder too: "none", or "cell": the frame is
            divided into as many equal cells as there are tokens, and each token has the center of its cell
            and the middle of the chunk.
        tv_position: positions of the variant tokens of a slice in the encoder: "time" is (t, 0, 0), "none",
            or "cell": the time of the slice and a cell each, in the decoder too.
        nearby: initial bias of queries and keys that makes attention fall off with the distance in the frame
            (see `look_nearby`).
        decoder_time: whether the decoder also rotates a slice's patches by t. Otherwise it is the same
            function for every slice, as in the paper's equation.
        query_grid: (rows, columns) of patches for which the decoder learns one query each, for a model of
            frames of one size. None: one learned query for all patches, as in SoftVQ, which the rotary
            embedding tells apart.
        scope: "sif" (scope-induced factorization) or "dense" (every token sees the chunk; the ablation).
        patch_scope: what a patch sees under "sif": its "slice" with the invariant tokens, the "patches" of
            its slice, or "all".
        quantizer: "softvq" (tokens are convex combinations of codewords), "fsq" (tokens are integers), or
            "none".
        levels: of fsq, one per latent_dim.
        codebook, tiv_codebooks, tv_codebooks: of softvq, the codewords in each codebook and how many
            codebooks the tokens of either kind are dealt to in order. Four in all over the tokens of a
            16-frame chunk, as in SoftVQ, are three and one.
        temperature: of the softmax over codewords.
        normalize: whether tokens and codewords have length 1.
        entropy_weight, entropy_temperature: of the quantizer's training loss.
        chunks_per_set: neighboring chunks that share one set of invariant tokens, the mean of theirs; None:
            all.
        merge: whether that mean is taken "before" the quantizer or "after" (not for fsq: a mean of codes is
            not a code).
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "t128": {"tiv": 96, "tv": 8, "latent_dim": 128},
        "t512": {"tiv": 384, "tv": 32, "latent_dim": 32},
        "t1024": {"tiv": 768, "tv": 64, "latent_dim": 16},
        # Not a size of the paper: small enough to train on a laptop, for 16x64x64 clips.
        "tiny": {
            "dim": 96,
            "depth": 3,
            "heads": 3,
            "tiv": 48,
            "tv": 4,
            "latent_dim": 16,
            "codebook": 512,
            "tiv_position": "cell",
            "tv_position": "cell",
            "nearby": 2.0,
        },
    }

    in_channels: int = 3
    frames: int = 16
    patch: tuple[int, int, int] = (4, 8, 8)
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    tiv: int = 96
    tv: int = 8
    latent_dim: int = 128
    rotary_split: tuple[int, int, int] | None = None
    tiv_position: str = "none"
    tv_position: str = "time"
    nearby: float = 0.0
    decoder_time: bool = False
    query_grid: tuple[int, int] | None = None
    scope: str = "sif"
    patch_scope: str = "slice"
    quantizer: str = "softvq"
    levels: tuple[int, ...] | None = None
    codebook: int = 8192
    tiv_codebooks: int = 3
    tv_codebooks: int = 1
    temperature: float = 0.07
    normalize: bool = True
    entropy_weight: float = 0.01
    entropy_temperature: float = 0.01
    chunks_per_set: int | None = None
    merge: str = "before"

    def __post_init__(self) -> None:
        self.set_tuples("patch", "levels", "rotary_split", "query_grid")
        self.need_at_least(
            1,
            "in_channels",
            "frames",
            "dim",
            "depth",
            "heads",
            "tiv",
            "tv",
            "latent_dim",
            "codebook",
            "tiv_codebooks",
            "tv_codebooks",
        )
        self.need_one_of("scope", "sif", "dense")
        self.need_one_of("patch_scope", "slice", "patches", "all")
        self.need_one_of("quantizer", "softvq", "fsq", "none")
        self.need_one_of("merge", "before", "after")
        self.need_one_of("tiv_position", "none", "cell")
        self.need_one_of("tv_position", "time", "none", "cell")
        if len(self.patch) != 3 or min(self.patch) < 1 or self.patch[1] != self.patch[2]:
            raise ValueError(
                f"patch={self.patch} must be (frames, rows, columns) with as many rows as columns"
            )
        if self.dim % self.heads or self.dim // self.heads % 2 or self.dim // self.heads < 6:
            raise ValueError(
                f"heads={self.heads} must cut dim={self.dim} into heads of an even size of at least 6, for "
                f"three axes"
            )
        if self.rotary_split is None:
            object.__setattr__(self, "rotary_split", tuple(split_head(self.dim // self.heads, 3)))
        if (
            len(self.rotary_split) != 3
            or sum(self.rotary_split) != self.dim // self.heads
            or any(n % 2 for n in self.rotary_split)
        ):
            raise ValueError(
                f"rotary_split={self.rotary_split} must be three even numbers that add up to a head's "
                f"{self.dim // self.heads} channels"
            )
        if self.query_grid is not None and (len(self.query_grid) != 2 or min(self.query_grid) < 1):
            raise ValueError(f"query_grid={self.query_grid} must be (rows, columns)")
        if self.frames % self.patch[0]:
            raise ValueError(
                f"frames={self.frames} must be a multiple of the {self.patch[0]} frames of a patch"
            )
        if self.chunks_per_set is not None:
            self.need_at_least(1, "chunks_per_set")
        if (self.levels is not None) != (self.quantizer == "fsq"):
            raise ValueError(
                f"levels={self.levels}: fsq needs levels, quantizer={self.quantizer!r} was given"
            )
        if self.quantizer == "fsq":
            if len(self.levels) != self.latent_dim:
                raise ValueError(
                    f"levels={self.levels}: fsq needs one number of levels for each of "
                    f"latent_dim={self.latent_dim}"
                )
            if min(self.levels) < 2 or math.prod(self.levels) > 2**31:
                raise ValueError(
                    f"levels={self.levels}: each must be at least 2, and their product at most 2**31"
                )
            if self.merge == "after":
                raise ValueError("merge='after': a mean of fsq codes is not a code")
        if self.quantizer == "softvq":
            for tokens, codebooks in (("tiv", "tiv_codebooks"), ("tv", "tv_codebooks")):
                if getattr(self, tokens) % getattr(self, codebooks):
                    raise ValueError(
                        f"{codebooks}={getattr(self, codebooks)} does not divide "
                        f"{tokens}={getattr(self, tokens)}"
                    )

    @property
    def slices(self) -> int:
        """Slices of a chunk."""
        return self.frames // self.patch[0]

    @property
    def tokens_per_chunk(self) -> int:
        return self.tiv + self.slices * self.tv

    @property
    def spatial_factor(self) -> int:
        return self.patch[1]

    # For `check_video`: any number of frames is taken, the last slice is filled up.
    time_downsample_factor: ClassVar[int] = 1
    causal: ClassVar[bool] = False
