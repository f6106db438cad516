"""InfoTok (arXiv 2512.16975, https://github.com/YWolfeee/InfoTok) in plain PyTorch: video to as many tokens
as it needs, and back.

    model = InfoTok.from_checkpoint("infotok_mse.pt", "flex-4x8x8")
    tokens = model.encode(video, rate=0.5)    # video (B, 3, T, H, W) in [-1, 1]; keeps half of the tokens
    packed = model.pack(tokens).to_bytes(model.codebook_size)
    video = model.decode(tokens)

A discrete Cosmos tokenizer with a transformer before and after the quantizer. A router scores every token by
decoding all of them and measuring the error of each token's pixels, or (cheaper, not from the paper) by how
much its latent differs from that of the previous frame. The tokens with the highest scores are kept; a
dropped one is zero to the decoder, and -1 in `Tokens.indices`. The grid stays dense; the length that varies
is that of the packed stream.

Unused options of the released code are left out (1D latents beside the 2D tokens). As in the released code,
neither transformer gets the rate or the mask (in the paper the rate is an input).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.io.tokens import DROPPED, Tokens
from vtok_fast.models.common.checks import check_finite
from vtok_fast.models.common.tokenizer import Reconstruction
from vtok_fast.models.common.windows import WindowStream
from vtok_fast.models.cosmos.model import CosmosBase
from vtok_fast.models.infotok.config import ROUTERS, InfoTokConfig
from vtok_fast.models.infotok.transformer import Block, rotary_angles
from vtok_fast.ops.token_packing import (
    PackedTokens,
    pack_tokens,
    router_scores,
    select_tokens,
    token_budget,
    token_rates,
    unpack_tokens,
)


class InfoTok(CosmosBase):
    """An InfoTok. State-dict keys are those of the released checkpoint, without its leading "network.".

    Args:
        config: a name in `InfoTokConfig.presets`, an `InfoTokConfig`, a dict of its fields, or None:
        fields: the fields of an `InfoTokConfig` (with config=None).

    `num_tokens` counts all of them, at rate 1. Methods that choose tokens take `choice`: rate, rate_strategy,
    router, selection as in `InfoTokConfig` (whose values hold otherwise), rate also as a tensor (B,), and
    elbo_mean, the mean score of the data (see `mean_score`), for "global_elbo" and "bin".

    Raises ValueError for an unknown name or an impossible structure.
    """

    system = "infotok"
    Config = InfoTokConfig

    def __init__(self, config: str | InfoTokConfig | dict[str, Any] | None = None, **fields: Any):
        super().__init__(config, **fields)
        config = self.config
        self.make_networks(config)
        self.temporal_embed = nn.Parameter(torch.empty(config.max_num_video_frames, config.hidden_size))
        for name, depth in (
            ("vit_encoder", config.num_encoder_layers),
            ("vit_decoder", config.num_decoder_layers),
        ):
            self.add_module(name, nn.ModuleList(self._make_block() for _ in range(depth)))
        # The running mean of scores; zero before the first clip
        self.register_buffer("ema_loss", torch.zeros(1))
        # Of the released state dict; nothing here uses it
        self.register_buffer("save_loss", torch.zeros(128))
        self.apply(self._initialize)

    def _make_block(self) -> Block:
        c = self.config
        return Block(
            c.hidden_size,
            c.num_attention_heads,
            c.intermediate_size,
            eps=c.rms_norm_eps,
            twice=c.double_projection,
        )

    def _initialize(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=std)
        elif module is self:
            nn.init.normal_(self.temporal_embed, std=std)

    # Whole videos

    def forward(self, video: Tensor, **choice: Any) -> Tensor:
        """Reconstruct video (B, C, T, H, W) from the chosen tokens; differentiable. See `encode` for
        errors."""
        self.check_video(video)
        codes, _ = self._bottleneck(video, choice)
        return self._decode(codes)[:, :, : video.shape[2]]

    def reconstruct(self, video: Tensor, *, step: int = 0, **choice: Any) -> Reconstruction:
        """`forward` for training: also codes (zero where dropped), indices (-1 where dropped), and a loss of
        zero: FSQ has none.

        In training mode the rate of each clip is drawn from `rate_bins`, unless given, and "elbo_ema" moves
        the running mean. No gradient passes through the router (inferred).
        """
        self.check_video(video)
        if self.training and "rate" not in choice:
            bins = torch.tensor(self.config.rate_bins, dtype=torch.float64)
            choice["rate"] = bins[torch.randint(len(bins), (video.shape[0],))].to(video.device)
        codes, indices = self._bottleneck(video, choice)
        return Reconstruction(
            self._decode(codes)[:, :, : video.shape[2]], codes, indices, codes.new_zeros(())
        )

    @torch.no_grad()
    def encode(self, video: Tensor, **choice: Any) -> Tokens:
        """Tokens of video (B, C, T, H, W) in [-1, 1], of the model's dtype; indices are -1 where a token was
        dropped.

        Raises TypeError for a wrong type, ValueError for a wrong rank, number of channels or size, a video of
        more latent frames than max_num_video_frames (see `stream`), an impossible choice, an empty batch, NaN
        or infinity.
        """
        self.check_video(video)
        check_finite("video", video)
        return self.make_tokens(video, indices=self._bottleneck(video, choice)[1])

    @torch.no_grad()
    def decode(self, tokens: Tokens | PackedTokens) -> Tensor:
        """The video (B, C, T, H, W), of tokens.dtype. Values are not clamped. Packed tokens: see `unpack`.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        tokens = self.unpack(tokens) if isinstance(tokens, PackedTokens) else tokens
        indices = self.check_tokens(tokens)
        codes = self._masked(self.codes_of(indices.clamp_min(0)), indices != DROPPED)
        return self._decode(codes)[:, :, : tokens.video_shape[0]].to(tokens.dtype)

    def stream(self, size: int = 81, overlap: int = 3) -> WindowStream:
        """Encode and decode a long video in windows; `overlap` frames are shared and mixed linearly. Defaults
        as in the released program."""
        return WindowStream(self, size, overlap)

    @property
    def window(self) -> tuple[int, int]:
        longest = 1 + (self.config.max_num_video_frames - 1) * self.config.time_downsample_factor
        return min(81, longest), min(3, longest - 1)

    # The packed stream

    def pack(self, tokens: Tokens) -> PackedTokens:
        """Only the kept tokens, clip by clip. `.to_bytes(model.codebook_size)` is what to
        store: a bit per position and ceil(log2(codebook_size)) bits per kept token. Errors as for
        `decode`."""
        indices = self.check_tokens(tokens)
        return pack_tokens(indices, indices != DROPPED)

    def unpack(
        self,
        packed: PackedTokens,
        *,
        video_shape: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tokens:
        """The tokens of a packed stream of clips of one size.

        Args:
            video_shape: (T, H, W); None: that of the grid, the last frames that filled up the video included.
            dtype: of the video; None: the model's.

        Raises ValueError for clips of several sizes, or as `decode`.
        """
        if packed.grids is not None or packed.mask.dim() != 4:
            raise ValueError(f"packed: expected clips of one size (t, h, w), got {packed.clip_grids}")
        t, h, w = packed.mask.shape[1:]
        s, parameter = self.config.spatial_factor, self.parameter
        shape = (
            (1 + (t - 1) * self.config.time_downsample_factor, h * s, w * s)
            if video_shape is None
            else tuple(video_shape)
        )
        tokens = Tokens(
            model=f"{self.system}/{self.config.name}",
            config=self.config.to_dict(),
            video_shape=shape,
            dtype=parameter.dtype if dtype is None else dtype,
            indices=unpack_tokens(packed, fill=DROPPED),
        )
        self.check_tokens(tokens)
        return tokens

    # The router

    @torch.no_grad()
    def scores(self, video: Tensor, router: str | None = None) -> Tensor:
        """How much each token matters: (B, t, h, w), float32 (float64 of a float64 model). Errors as for
        `encode`.

        "decode": the mean absolute error of its pixels after a decode of all tokens. "latent": the mean
        absolute difference of its latent before the quantizer from the one a frame before; in the first frame
        the clip's largest (inferred: that frame comes first). "even": one, for every token.
        """
        self.check_video(video)
        x = self.fill_up(video)
        z = self._encode(x)
        return self._scores(x, z, self.quantizer(z).codes, router)

    def mean_score(self, videos: Iterable[Tensor]) -> float:
        """The mean of `scores` over videos of any sizes, each with equal weight: the `elbo_mean` of
        "global_elbo" and "bin"."""
        means = [
            score for video in videos for score in self.scores(video).flatten(1).double().mean(1).tolist()
        ]
        if not means:
            raise ValueError("videos: there are none")
        return sum(means) / len(means)

    def _scores(self, x: Tensor, z: Tensor, codes: Tensor, router: str | None) -> Tensor:
        router = self.config.router if router is None else router
        if router not in ROUTERS:
            raise ValueError(f"router={router!r}: expected one of {', '.join(ROUTERS)}")
        with torch.no_grad():
            if router == "decode":
                s = self.config.spatial_factor
                reconstruction = self._decode(codes.detach()).to(x.dtype)  # autocast may have narrowed it
                return router_scores(x, reconstruction, (self.config.time_downsample_factor, s, s))
            z = z.detach() if z.dtype == torch.float64 else z.detach().float()
            if router == "even":
                return torch.ones_like(z[:, 0])
            change = z.diff(dim=2).abs().mean(1)
            first = change.flatten(1).amax(1) if z.shape[2] > 1 else z.new_zeros(len(z))
            return torch.cat((first[:, None, None, None].expand(-1, 1, *z.shape[3:]), change), dim=1)

    def keep(
        self,
        scores: Tensor,
        *,
        rate: float | Tensor | None = None,
        rate_strategy: str | None = None,
        selection: str | None = None,
        router: str | None = None,
        elbo_mean: float | Tensor | None = None,
    ) -> Tensor:
        """Which tokens are kept: bool, like scores (B, t, h, w). Errors as for `vtok_fast.token_budget` and
        `vtok_fast.select_tokens`; ValueError for "elbo_ema" in evaluation before any training moved its
        mean."""
        config = self.config
        rate = config.rate if rate is None else rate
        strategy = config.rate_strategy if rate_strategy is None else rate_strategy
        selection = config.selection if selection is None else selection
        if strategy == "elbo_ema":
            if self.training:
                # The state dict starts at zero, token_budget at NaN
                self.ema_loss.masked_fill_(self.ema_loss <= 0, torch.nan)
            elif self.ema_loss.item() > 0:
                strategy = "global_elbo"
            else:
                raise ValueError(
                    "rate_strategy='elbo_ema': the model has no running mean of scores, it was not trained "
                    "so; "
                    "'global_elbo' takes elbo_mean"
                )
            elbo_mean = self.ema_loss
        by = {"strategy": strategy, "elbo_mean": elbo_mean, "decay": config.decay}
        if selection == "threshold":
            return select_tokens(scores, rate=token_rates(scores, rate, **by), method=selection)
        budget = token_budget(scores, rate, **by)
        if selection.startswith("order"):
            even = (self.config.router if router is None else router) == "even"
            budget = (even_budgets if even else frame_budgets)(scores, budget)
        return select_tokens(scores, budget, method=selection)

    # What the above is made of

    def _bottleneck(self, video: Tensor, choice: dict) -> tuple[Tensor, Tensor]:
        """Codes, zero where dropped, and indices, -1 where dropped."""
        router = choice.get("router")
        x = self.fill_up(video)
        z = self._encode(x)
        codes, indices, _ = self.quantizer(z)
        keep = self.keep(self._scores(x, z, codes, router), **choice)
        return self._masked(codes, keep), indices.masked_fill(~keep, DROPPED)

    def _encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.transform(self.vit_encoder, self.encoder(x)))

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.transform(self.vit_decoder, self.post_quant_conv(codes)))

    def transform(self, blocks: nn.ModuleList, z: Tensor) -> Tensor:
        """One of the two transformers on a latent (B, C, t, h, w)."""
        t, h, w = z.shape[2:]
        x = z.movedim(1, -1) + self.temporal_embed[:t, None, None]
        angles = rotary_angles(
            h, w, self.config.hidden_size // self.config.num_attention_heads, self.config.theta, z.device
        )
        x = x.flatten(1, 3)
        for block in blocks:
            x = block(x, angles, t)
        return x.unflatten(1, (t, h, w)).movedim(-1, 1)

    @staticmethod
    def _masked(codes: Tensor, keep: Tensor) -> Tensor:
        return codes.masked_fill(~keep.unsqueeze(1), 0.0)

    def check_video(self, video: Tensor) -> None:
        super().check_video(video)
        frames = self.token_grid(*video.shape[2:])[0]
        if frames > self.config.max_num_video_frames:
            raise ValueError(
                f"video has {video.shape[2]} frames, which are {frames} latent ones; the model takes "
                f"{self.config.max_num_video_frames}, stream() takes any number"
            )

    def check_tokens(self, tokens: Tokens) -> Tensor:
        if isinstance(tokens, Tokens) and tokens.indices is not None:
            kept = tokens.indices.where(tokens.indices != DROPPED, 0)
            super().check_tokens(replace(tokens, indices=kept))
            return tokens.indices.to(self.parameter.device)
        return super().check_tokens(tokens)


def frame_rates(scores: Tensor, rate: Tensor) -> Tensor:
    """The share of each latent frame's tokens: (B, t), in proportion to its mean score, with mean rate (B,)
    and no more than 1.

    What exceeds 1 goes to the other frames, again in proportion (inferred; at rate 1 it makes every share 1,
    as in the released code).
    """
    weight = scores.flatten(2).double().mean(2).clamp_min(1e-12)
    total = rate.to(weight)[:, None] * weight.shape[1]
    share = weight * (total / weight.sum(1, keepdim=True))
    for _ in range(weight.shape[1] - 1):  # each round fills one frame at least, or changes nothing
        full = share >= 1
        rest = (weight * ~full).sum(1, keepdim=True).clamp_min(1e-300)
        share = torch.where(full, 1.0, weight * (total - full.sum(1, keepdim=True)) / rest)
    return share.clamp_max(1.0)


def frame_budgets(scores: Tensor, budget: Tensor) -> Tensor:
    """Tokens to keep of each latent frame, (B, t): index <= share * n, as the released code's "order"
    does."""
    n = scores[0, 0].numel()
    share = frame_rates(scores, budget.double() / (n * scores.shape[1]))
    # A whole number may come out a rounding error below itself.
    return (share * n + 1e-9).floor().add(1).clamp_max(n).to(torch.int64)


def even_budgets(scores: Tensor, budget: Tensor) -> Tensor:
    """Tokens to keep of each latent frame, (B, t): alike, and the first frames one more where the budget (B,)
    does not divide."""
    t = scores.shape[1]
    budget = budget.clamp(0, scores[0].numel())[:, None]
    return budget // t + (torch.arange(t, device=budget.device) < budget % t)
