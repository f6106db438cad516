"""``norm_act``: its face and reference (op), the call as data (call), a file per backend (triton, cpu), and
who computes the gradient (gradient)."""

from vtok_fast.ops.norm_act import gradient  # noqa: F401  its ops and the derivative of the op are registered there
from vtok_fast.ops.norm_act.op import KINDS, ROUNDINGS, norm_act

__all__ = ["KINDS", "ROUNDINGS", "norm_act"]
