"""What the repository offers."""

from . import layers
from .dispatch.available import available_backends
from .dispatch.backends import BackendError, backend, fallbacks
from .ops.causal_conv3d import causal_conv3d
from .ops.fsq import FSQOutput, fsq_decode, fsq_entropy_loss, fsq_quantize
from .ops.norm_act import norm_act
from .ops.scope_attention import Scope, scope_attention
from .ops.token_packing import (
    PackedTokens,
    pack_tokens,
    router_scores,
    select_tokens,
    token_budget,
    unpack_tokens,
)

__all__ = [
    "BackendError",
    "FSQOutput",
    "PackedTokens",
    "Scope",
    "available_backends",
    "backend",
    "causal_conv3d",
    "fallbacks",
    "fsq_decode",
    "fsq_entropy_loss",
    "fsq_quantize",
    "layers",
    "norm_act",
    "pack_tokens",
    "router_scores",
    "scope_attention",
    "select_tokens",
    "token_budget",
    "unpack_tokens",
]
