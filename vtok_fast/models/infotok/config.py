"""What an InfoTok is made of: a discrete Cosmos tokenizer and two transformers.

Source: arXiv 2512.16975, https://github.com/YWolfeee/InfoTok (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtok_fast.models.cosmos.config import FSQ_LEVELS, CosmosConfig
from vtok_fast.reference.token_packing import METHODS, STRATEGIES

ROUTERS = ("decode", "latent", "even")


def _choice(default: Any) -> Any:
    """A field that says how tokens are chosen, not what they mean: models that differ in it read each other's
    tokens."""
    return field(default=default, compare=False)


@dataclass(frozen=True)
class InfoTokConfig(CosmosConfig):
    """The structure of one InfoTok, and how it chooses tokens by default. It extends a discrete
    `CosmosConfig`.

    Attributes:
        hidden_size, num_attention_heads, intermediate_size: of the transformers; hidden_size equals
            z_channels, because there is no projection.
        num_encoder_layers, num_decoder_layers: blocks before the quantizer and after it.
        theta, rms_norm_eps, initializer_range: of rotary positions, norms, and initial weights (the last one
            normal; inferred for the temporal embedding).
        max_num_video_frames: latent frames of the longest video; longer ones go window by window.
        double_projection: q, k and v pass the input projection twice, as in the released checkpoint (and
            against the paper).
        rate: share of the tokens to keep.
        rate_bins: the shares of which one is drawn for each clip in training (InfoTok-Flex).
        rate_strategy: "elbo" (that share of every clip), "global_elbo" (more of clips with a larger error
            than `elbo_mean`), "bin" (that, in quarters), "elbo_ema" (global_elbo with a running mean over
            training).
        router: what scores the tokens: "decode" (the error of a full decode), "latent" (how much a latent
            differs from the one a frame before; no decode) or "even" (all alike, for "order" and
            "order_strided": the baseline that does not look).
        selection: "threshold" (as released: ties and, at rate 1, one token are dropped), "topk" (exact
            counts), "order" or "order_strided" (the first tokens of every frame).
        decay: of the running mean: 0.99 in the paper, 0.95 in the released code.
    """

    levels: tuple[int, ...] | None = FSQ_LEVELS
    temporal_compression: int = 4
    patch_size: int = 2
    z_channels: int = 256
    layout: str = "predict1"
    hidden_size: int = 256
    intermediate_size: int = 512
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    num_attention_heads: int = 32
    theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_num_video_frames: int = 49
    double_projection: bool = True
    rate: float = _choice(0.75)
    rate_bins: tuple[float, ...] = _choice((0.25, 0.5, 0.75, 1.0))
    rate_strategy: str = _choice("elbo")
    router: str = _choice("decode")
    selection: str = _choice("threshold")
    decay: float = _choice(0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_tuples("rate_bins")
        self.need_one_of("formulation", "FSQ")
        self.need_one_of("rate_strategy", *STRATEGIES)
        self.need_one_of("router", *ROUTERS)
        self.need_one_of("selection", *METHODS)
        self.need_at_least(
            1, "hidden_size", "intermediate_size", "num_attention_heads", "max_num_video_frames"
        )
        self.need_at_least(0, "num_encoder_layers", "num_decoder_layers")
        if self.hidden_size != self.z_channels * self.z_factor or self.z_factor != 1:
            raise ValueError(
                f"hidden_size={self.hidden_size} must equal z_channels={self.z_channels}, with z_factor=1"
            )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size} "
                f"into "
                "heads of a multiple of 4 channels: pairs for rows, and as many for columns"
            )
        for name, values in (("rate", (self.rate,)), ("rate_bins", self.rate_bins), ("decay", (self.decay,))):
            if not values or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0 to 1")


InfoTokConfig.presets = {
    "flex-4x8x8": {},  # the released model, for 240p
    # Not a released model: small enough to train on a laptop, for 17x128x128 clips.
    "tiny": {
        "channels": 16,
        "channels_mult": (1, 2, 3),
        "num_res_blocks": 1,
        "z_channels": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
    },
}
