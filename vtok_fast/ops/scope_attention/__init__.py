"""``scope_attention``, block-sparse attention: its face and reference (op), calls as data (call), a file per
backend (triton, cpu), who computes the gradient (gradient), and what each query sees (scope)."""

from vtok_fast.ops.scope_attention import gradient  # noqa: F401  registered there: the derivative
from vtok_fast.ops.scope_attention.op import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope

__all__ = ["Scope", "scope_attention"]
