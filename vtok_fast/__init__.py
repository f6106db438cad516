"""Fast kernels for video tokenizers, behind a thin PyTorch API.

Ops: ``causal_conv3d``, ``norm_act``, ``fsq_quantize``, ``fsq_decode``, ``fsq_entropy_loss``,
``scope_attention`` with ``Scope``, ``router_scores``, ``token_budget``, ``select_tokens``, ``pack_tokens``,
``unpack_tokens``. ``accelerate`` and ``accelerated`` swap them into an existing model; ``stream`` runs one
chunk by chunk. ``backend``, ``algorithm``, ``available_backends`` and ``fallbacks``: which kernel runs.
``Tokens`` and ``TokenWindows``: what a tokenizer makes of a video, and its file. ``vtok_fast.nn``: modules.
``vtok_fast.models``: tokenizers. ``vtok_fast.parity``: how equality is measured.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the command line's doctor still has something to say then
    _why = str(error)

    def __getattr__(name: str) -> object:
        raise ImportError(f"vtok_fast.{name} needs torch, which cannot be imported: {_why}")
else:
    from vtok_fast import models, nn
    from vtok_fast.dispatch.backends import BackendError, algorithm, available_backends, backend, fallbacks
    from vtok_fast.io.token_windows import TokenWindows
    from vtok_fast.io.tokens import Tokens
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

__all__ = [
    "BackendError",
    "FSQOutput",
    "PackedTokens",
    "Report",
    "Scope",
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
__version__ = "0.1.0"
