"""What can run here at all, op by op."""

from __future__ import annotations

import torch

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Backend, Reason, backends_of_ops, why_no_triton


def available_backends() -> dict[str, dict[str, Reason]]:
    """Per op, each backend of this version with None where it can run here at all, or the reason why not."""

    def reason(candidate: Backend) -> Reason:
        if candidate.name == "triton":
            return why_no_triton() or (None if torch.cuda.is_available() else "there is no GPU")
        if candidate.name in ("sm90", "sm80"):
            return native.why_no_cuda()
        return native.why_missing() if candidate.name == "cpu" and candidate.needs_native else None

    return {op: {b.name: reason(b) for b in backends} for op, backends in backends_of_ops().items()}
