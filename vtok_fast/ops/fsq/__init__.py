"""``fsq``: its face and reference (op), calls as data (call), a file per backend (sm80, cpu), and who
computes the gradient (gradient)."""

from vtok_fast.ops.fsq import gradient  # noqa: F401  registered there: the derivative
from vtok_fast.ops.fsq.call import threshold_table
from vtok_fast.ops.fsq.op import VARIANTS, FSQOutput, check_levels, fsq_decode, fsq_entropy_loss, fsq_quantize

__all__ = [
    "VARIANTS",
    "FSQOutput",
    "check_levels",
    "fsq_decode",
    "fsq_entropy_loss",
    "fsq_quantize",
    "threshold_table",
]
