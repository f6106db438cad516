"""Block-sparse attention over scopes."""

from vtok_fast.ops.scope_attention.op import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope

__all__ = ["Scope", "scope_attention"]
