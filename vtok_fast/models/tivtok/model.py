"""TivTok (arXiv 2606.17590): tokens that hold for a whole clip, and a few more for each slice of it.

    model = TivTok("t128")
    tokens = model.encode(video)   # video (B, 3, T, H, W) in [-1, 1]
    video = model.decode(tokens)   # 128 frames of 256x256 are 96 + 32 * 8 = 352 tokens

The encoder is one ViT over [TIV | TV(1) X(1) | TV(2) X(2) | ...]: learned queries TIV and TV(t), and the
patches X(t) of slice t. Their *scopes* differ: TIV sees everything, TV(t) only TIV, itself and X(t)
(scope-induced factorization, by `scope_attention`). The decoder makes each slice separately from TIV and
TV(t) (invariant broadcasting), so slices form a batch. A long video is cut into chunks of 16 frames, which
are encoded separately and then share the mean of their TIV. The last chunk may have fewer slices; its last
slice is padded with copies of the last frame.

Details that are inferred, because the paper does not state them, are options of `TivTokConfig`.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.regularizers import FSQRegularizer
from vtok_fast.models.common.tokenizer import Reconstruction, Tokenizer
from vtok_fast.models.common.transformer import (
    Attend,
    Transformer,
    cells,
    init_vit,
    look_nearby,
    patchify,
    rotary_frequencies,
    rotary_table,
    unpatchify,
)
from vtok_fast.models.common.windows import WindowStream
from vtok_fast.models.tivtok.config import TivTokConfig
from vtok_fast.models.tivtok.quantizer import SoftVQ
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope

CHUNKS_AT_ONCE, SLICES_AT_ONCE = 8, 32  # in one batch, of one video; they bound the memory


class TivTok(Tokenizer):
    """A TivTok.

    Args:
        config: a name in `TivTokConfig.presets`, a `TivTokConfig`, a dict of its fields, or None:
        fields: the fields of a `TivTokConfig` (with config=None).

    Raises ValueError for an unknown name or an impossible structure.
    """

    system, Config = "tivtok", TivTokConfig

    def __init__(self, config: str | TivTokConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quantizer = Quantizer(c)
        self.latent_channels = c.latent_dim
        if c.quantizer == "fsq":
            self.codebook_size = self.quantizer.fsq.codebook_size
        self.apply(init_vit)
        if c.nearby:
            for part in (self.encoder, self.decoder):
                look_nearby(part.transformer, c.rotary_split, (1, 2), c.nearby)

    def check_video(self, video: Tensor) -> None:
        super().check_video(video)
        size, c = video.shape[3:], self.config
        if c.query_grid is not None and tuple(size) != (
            wanted := tuple(n * p for n, p in zip(c.query_grid, c.patch[1:]))
        ):
            raise ValueError(
                f"video is {size[0]}x{size[1]}, a model with query_grid={c.query_grid} takes "
                f"{wanted[0]}x{wanted[1]}"
            )

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, C, T, H, W); differentiable. Errors as for `encode`."""
        self.check_video(video)
        return self._decode(self._encode(video)[0], tuple(video.shape[2:]))

    def reconstruct(self, video: Tensor, *, step: int = 0) -> Reconstruction:
        """`forward` for training: also the codes (B, latent_dim, 1, 1, N), the indices and the quantizer's
        loss."""
        self.check_video(video)
        codes, indices, loss = self._encode(video, step=step)
        return Reconstruction(self._decode(codes, tuple(video.shape[2:])), codes, indices, loss)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype, of any length.

        They lie in a row, the sets of invariant tokens first, then those of each slice: latents (B,
        latent_dim, 1, 1, N), or with fsq indices (B, 1, 1, N).

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, an empty
        batch, NaN or infinity.
        """
        self.check_video(video)
        check_finite("video", video)
        codes, indices, _ = self._encode(video)
        return self.make_tokens(video, indices=indices, latents=codes if indices is None else None)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype. Values are not clamped.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        data = self.check_tokens(tokens)
        codes = data if tokens.indices is None else self.quantizer.fsq.decode(data, self.parameter.dtype)
        return self._decode(codes, tokens.video_shape).to(tokens.dtype)

    def stream(self, frames: int | None = None) -> WindowStream:
        """Encode and decode a video in windows of `frames` (default: eight chunks), each with invariant
        tokens of its own."""
        return WindowStream(self, frames or self.window[0])

    @property
    def window(self) -> tuple[int, int]:
        return CHUNKS_AT_ONCE * self.config.frames, 0  # more would share more, in more memory

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(1, 1, N): the tokens lie in a row, and their number does not depend on the frame size."""
        c = self.config
        return 1, 1, self._sets(frames) * c.tiv + self._slices(frames) * c.tv

    # What the above is made of

    def _slices(self, frames: int) -> int:
        return -(-frames // self.config.patch[0])

    def _sets(self, frames: int) -> int:
        chunks = -(-frames // self.config.frames)
        return -(-chunks // (self.config.chunks_per_set or chunks))

    def _encode(self, video: Tensor, step: int | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The codes in a row, their indices, and with step the quantizer's loss."""
        c = self.config
        tiv, tv = self._latents(video)
        if c.merge == "before":
            tiv = self._merge(tiv)
        (tiv, tiv_indices, tiv_loss), (tv, tv_indices, tv_loss) = self.quantizer(tiv, tv, step)
        if c.merge == "after":
            tiv = self._merge(tiv)
        codes = torch.cat((tiv.flatten(1, 2), tv.flatten(1, 2)), dim=1).mT[:, :, None, None]
        indices = (
            None
            if tiv_indices is None
            else torch.cat((tiv_indices.flatten(1), tv_indices.flatten(1)), dim=1)[:, None, None]
        )
        return codes, indices, None if step is None else tiv_loss + tv_loss

    def _latents(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """TIV (B, chunks, tiv, latent_dim) and TV (B, slices, tv, latent_dim) of all chunks of a video,
        before the quantizer."""
        c = self.config
        video = fill_up(video, c.patch[0])
        whole = video.shape[2] // c.frames * c.frames
        parts = []
        for start in range(0, whole, CHUNKS_AT_ONCE * c.frames):
            group = video[:, :, start : min(start + CHUNKS_AT_ONCE * c.frames, whole)]
            chunks = group.unflatten(2, (-1, c.frames)).transpose(1, 2).flatten(0, 1)
            parts.append([x.unflatten(0, (video.shape[0], -1)) for x in self.encoder(chunks)])
        if whole < video.shape[2]:
            parts.append([x.unsqueeze(1) for x in self.encoder(video[:, :, whole:])])
        return torch.cat([tiv for tiv, _ in parts], 1), torch.cat([tv.flatten(1, 2) for _, tv in parts], 1)

    def _merge(self, tiv: Tensor) -> Tensor:
        """(B, chunks, tiv, C) -> (B, sets, tiv, C): the means of the chunks that share a set."""
        return torch.stack(
            [group.mean(1) for group in tiv.split(self.config.chunks_per_set or tiv.shape[1], dim=1)], dim=1
        )

    def _decode(self, codes: Tensor, size: tuple[int, int, int]) -> Tensor:
        """The video of size (T, H, W) of codes (B, latent_dim, 1, 1, N)."""
        c, (frames, height, width) = self.config, size
        slices, sets = self._slices(frames), self._sets(frames)
        row = codes[:, :, 0, 0].mT
        tiv, tv = (
            row[:, : sets * c.tiv].unflatten(1, (sets, c.tiv)),
            row[:, sets * c.tiv :].unflatten(1, (slices, c.tv)),
        )
        chunk = torch.arange(slices, device=row.device) // c.slices
        # The set of each slice; slices is more than there are chunks
        own = chunk // (c.chunks_per_set or slices)
        parts = [
            self.decoder(tiv[:, own[i : i + SLICES_AT_ONCE]], tv[:, i : i + SLICES_AT_ONCE], height, width, i)
            for i in range(0, slices, SLICES_AT_ONCE)
        ]
        return torch.cat(parts, dim=2)[:, :, :frames]


class Encoder(nn.Module):
    """Chunks (B, C, T, H, W), T a multiple of patch[0], to latents TIV (B, tiv, latent_dim) and TV (B,
    slices, tv, latent_dim)."""

    def __init__(self, config: TivTokConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(
            config.in_channels * config.patch[0] * config.patch[1] * config.patch[2], config.dim
        )
        self.tiv = nn.Parameter(0.02 * torch.randn(config.tiv, config.dim))
        self.tv = nn.Parameter(0.02 * torch.randn(config.tv, config.dim))
        self.transformer = Transformer(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.to_latent = nn.Linear(config.dim, config.latent_dim)

    def forward(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        b, _, frames, height, width = chunk.shape
        slices, rows, columns = frames // c.patch[0], height // c.patch[1], width // c.patch[2]
        x = self.embed(patchify(chunk, c.patch)).unflatten(1, (slices, -1))
        x = torch.cat((self.tv.to(x.dtype).expand(b, slices, -1, -1), x), dim=2).flatten(1, 2)
        x = torch.cat((self.tiv.to(x.dtype).expand(b, -1, -1), x), dim=1)
        positions = encoder_positions(c, slices, rows, columns, x.device)
        x = self.transformer(x, rotary_angles(c, positions), attend_by_scope(c, slices, rows * columns))
        tv = x[:, c.tiv :].unflatten(1, (slices, -1))[:, :, : c.tv]
        return self.to_latent(x[:, : c.tiv]), self.to_latent(tv)


class Decoder(nn.Module):
    """TIV (B, slices, tiv, latent_dim) and TV (B, slices, tv, latent_dim) to the frames (B, C, slices *
    patch[0], H, W)."""

    def __init__(self, config: TivTokConfig):
        super().__init__()
        self.config = config
        self.from_latent = nn.Linear(config.latent_dim, config.dim)
        self.latent_embedding = nn.Parameter(0.02 * torch.randn(config.tiv + config.tv, config.dim))
        rows, columns = config.query_grid or (1, 1)
        self.patch_queries = nn.Parameter(0.02 * torch.randn(rows * columns, config.dim))
        self.transformer = Transformer(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.to_pixels = nn.Linear(
            config.dim, config.in_channels * config.patch[0] * config.patch[1] * config.patch[2]
        )

    def forward(self, tiv: Tensor, tv: Tensor, height: int, width: int, first: int = 0) -> Tensor:
        """`first` is the number of the first of these slices in its video."""
        c = self.config
        b, slices = tv.shape[:2]
        rows, columns = height // c.patch[1], width // c.patch[2]
        latents = self.from_latent(torch.cat((tiv, tv), dim=2)).flatten(0, 1)
        latents = latents + self.latent_embedding.to(latents.dtype)
        queries = self.patch_queries.to(latents.dtype).expand(b * slices, rows * columns, -1)
        x = self.transformer(
            torch.cat((queries, latents), dim=1), self.angles(first, b, slices, rows, columns)
        )
        patches = self.to_pixels(x[:, : rows * columns]).reshape(b, slices * rows * columns, -1)
        return unpatchify(patches, c.patch, (slices * c.patch[0], height, width))

    def angles(self, first: int, batch: int, slices: int, rows: int, columns: int) -> Tensor:
        """Of the patches, then of the tokens, which stand at time 0. They are the same for every slice,
        unless there is decoder_time."""
        device = self.patch_queries.device
        if self.config.decoder_time:
            patches = grid(slices, rows, columns, device).unflatten(0, (slices, -1))
            patches[..., 0] = (first + patches[..., 0]) % self.config.slices
        else:
            patches = grid(1, rows, columns, device)
        tokens = F.pad(
            torch.cat([places(self.config, kind, rows, columns, device) for kind in ("tiv", "tv")]), (1, 0)
        )
        angles = rotary_angles(
            self.config, torch.cat((patches, tokens.expand(*patches.shape[:-2], -1, -1)), dim=-2)
        )
        return angles.repeat(batch, 1, 1) if angles.dim() == 3 else angles


class Quantizer(nn.Module):
    """Quantizes TIV and TV, (B, n, tokens, latent_dim) each, to (codes, indices (B, n, tokens) or None, loss
    or None) each."""

    def __init__(self, config: TivTokConfig):
        super().__init__()
        self.kind = config.quantizer
        if self.kind == "fsq":
            self.fsq = FSQRegularizer(config.levels, entropy_loss_weight=config.entropy_weight)
        elif self.kind == "softvq":
            names = ("temperature", "normalize", "entropy_weight", "entropy_temperature")
            options = {name: getattr(config, name) for name in names}
            self.tiv = SoftVQ(config.tiv_codebooks, config.codebook, config.latent_dim, **options)
            self.tv = SoftVQ(config.tv_codebooks, config.codebook, config.latent_dim, **options)

    def forward(
        self, tiv: Tensor, tv: Tensor, step: int | None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        if self.kind == "none":
            return [(z, None, z.new_zeros(())) for z in (tiv, tv)]
        if self.kind == "softvq":
            results = []
            for layer, z in ((self.tiv, tiv), (self.tv, tv)):
                codes, loss = layer(z.flatten(0, 1), loss=step is not None)
                results.append((codes.view_as(z), None, loss))
            return results
        results = []
        for z in (tiv, tv):
            codes, indices, loss = self.fsq(z.movedim(-1, 1), step=step)
            results.append((codes.movedim(1, -1), indices, loss))
        return results


# ---- positions and scopes ----------------------------------------------------------------------------------


def fill_up(video: Tensor, multiple: int) -> Tensor:
    """Repeat the last frame until there is a multiple of frames."""
    missing = -video.shape[2] % multiple
    return torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else video


def grid(slices: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The positions (t, h, w) of all patches, (slices * rows * columns, 3)."""
    axes = [torch.arange(n, device=device) for n in (slices, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def places(config: TivTokConfig, kind: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """The positions (h, w) of the tokens of a kind, "tiv" or "tv", (n, 2)."""
    count = getattr(config, kind)
    if getattr(config, f"{kind}_position") == "cell":
        return cells(count, rows, columns, device)
    return torch.zeros(count, 2, dtype=torch.float64, device=device)


def encoder_positions(
    config: TivTokConfig, slices: int, rows: int, columns: int, device: torch.device
) -> Tensor:
    """The positions (t, h, w) of [TIV | TV(1) X(1) | ...], (N, 3), float64."""
    patches = grid(slices, rows, columns, device).double().unflatten(0, (slices, -1))
    times = torch.arange(slices, dtype=torch.float64, device=device) * (config.tv_position != "none")
    tv = places(config, "tv", rows, columns, device).expand(slices, -1, -1)
    tv = torch.cat((times[:, None, None].expand(-1, config.tv, 1), tv), dim=-1)
    middle = (slices - 1) / 2 if config.tiv_position == "cell" else 0.0
    tiv = F.pad(places(config, "tiv", rows, columns, device), (1, 0), value=middle)
    return torch.cat((tiv, torch.cat((tv, patches), dim=1).flatten(0, 1)))


def rotary_angles(config: TivTokConfig, positions: Tensor) -> Tensor:
    return rotary_table(positions, [rotary_frequencies(n) for n in config.rotary_split])


def attend_by_scope(config: TivTokConfig, slices: int, patches: int) -> Attend:
    """The attention of the encoder's tokens [TIV | TV(1) X(1) | ...] by their scopes."""
    if config.scope == "dense":
        return F.scaled_dot_product_attention
    return partial(
        scope_attention, scope=encoder_scope(config.tiv, config.tv, patches, slices, config.patch_scope)
    )


@torch.compiler.disable
@lru_cache(maxsize=64)
def encoder_scope(tiv: int, tv: int, patches: int, slices: int, patches_see: str) -> Scope:
    """One object for each size of video: what a backend works out from a scope is kept on it."""
    return Scope.time_invariant(tiv=tiv, tv=tv, patches=patches, slices=slices, patches_see=patches_see)
