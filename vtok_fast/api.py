"""What `vtok_fast` exports. Importing this imports torch, and registers the ops with it: all folders of
vtok_fast/ops, whether or not something of theirs is exported."""

import importlib

from vtok_fast import models, nn
from vtok_fast.corpus.dataset import TokenClip, TokenDataset
from vtok_fast.corpus.loader import TokenLoader
from vtok_fast.dispatch.available import available_backends
from vtok_fast.dispatch.backends import BackendError, algorithm, backend, fallbacks
from vtok_fast.io.token_windows import TokenWindows
from vtok_fast.io.tokens import Tokens
from vtok_fast.ops import FOLDERS
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import FSQOutput, fsq_decode, fsq_entropy_loss, fsq_quantize
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing import (
    PackedTokens,
    pack_tokens,
    router_scores,
    select_tokens,
    token_budget,
    unpack_tokens,
)
from vtok_fast.swap import Report, accelerate, accelerated, stream

for _folder in FOLDERS:
    importlib.import_module(f"vtok_fast.ops.{_folder}")

__all__ = [
    "BackendError",
    "FSQOutput",
    "PackedTokens",
    "Report",
    "Scope",
    "TokenClip",
    "TokenDataset",
    "TokenLoader",
    "TokenWindows",
    "Tokens",
    "accelerate",
    "accelerated",
    "algorithm",
    "available_backends",
    "backend",
    "causal_conv3d",
    "fallbacks",
    "fsq_decode",
    "fsq_entropy_loss",
    "fsq_quantize",
    "models",
    "nn",
    "norm_act",
    "pack_tokens",
    "router_scores",
    "scope_attention",
    "select_tokens",
    "stream",
    "token_budget",
    "unpack_tokens",
]
