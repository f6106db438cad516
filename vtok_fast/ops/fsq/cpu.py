"""The CPU kernel of ``fsq``."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.fsq.call import FSQCall, empty_outputs, threshold_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 6


def why_not(call: FSQCall) -> Reason:
    """The reason why the kernel cannot run a checked call, or None."""
    if (reason := native.why_not_on_cpu(call.z, DTYPES)) is not None:
        return reason
    return f"rank {call.z.dim()}, at most {MAX_RANK}" if call.z.dim() > MAX_RANK else None


def run(call: FSQCall) -> tuple[Tensor, Tensor]:
    """Runs a checked call."""
    codes, indices = empty_outputs(call.z, call.dim)
    arg = native.arg
    native.lib().fsq_quantize(
        arg(call.z),
        arg(codes),
        arg(indices),
        arg(threshold_table(call.levels, call.variant)),
        call.levels,
        call.dim,
        native.threads(),
    )
    return codes, indices
