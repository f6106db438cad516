"""Which tokens are kept (scores, budget, selection), and their variable-length packing: its face and
reference (op), calls as data (call), a file per backend (triton, cpu), the derivative (gradient)."""

from vtok_fast.ops.token_packing import gradient  # noqa: F401  registered there: the derivative
from vtok_fast.ops.token_packing.budget import token_budget, token_rates
from vtok_fast.ops.token_packing.op import pack_tokens, unpack_tokens
from vtok_fast.ops.token_packing.packed_tokens import PackedTokens
from vtok_fast.ops.token_packing.scores import router_scores
from vtok_fast.ops.token_packing.selection import select_tokens

__all__ = [
    "PackedTokens",
    "pack_tokens",
    "router_scores",
    "select_tokens",
    "token_budget",
    "token_rates",
    "unpack_tokens",
]
