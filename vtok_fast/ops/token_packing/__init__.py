"""Which tokens are kept, and their variable-length packing."""

from vtok_fast.ops.token_packing.op import pack_tokens, unpack_tokens
from vtok_fast.ops.token_packing.packed_tokens import PackedTokens
from vtok_fast.ops.token_packing.selection import router_scores, select_tokens, token_budget, token_rates

__all__ = [
    "PackedTokens",
    "pack_tokens",
    "router_scores",
    "select_tokens",
    "token_budget",
    "token_rates",
    "unpack_tokens",
]
