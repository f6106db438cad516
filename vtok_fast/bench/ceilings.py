"""The two ceilings of a machine, measured before anything else: the bandwidth of a large copy, and the rate
of a matrix product.

Everything is compared with these and not with a data sheet. Both are the best of several runs, on random
data: zeros are faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.bench.harness import Candidate, Settings, dtype_name, interleave

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


def measure(settings: Settings) -> dict[str, Any]:
    """``copy_gb_s``, reads and writes counted; ``matmul_tflop_s`` by dtype: that of the settings, and float32
    (in TF32 where the convolutions of cuDNN may use it)."""
    kind = torch.device(settings.device).type
    short = Settings(
        settings.quick,
        min_rounds=3 if settings.quick else 7,
        min_seconds=0.1,
        max_seconds=5.0,
        device=settings.device,
    )
    source = torch.randn(COPY_BYTES[kind] // 4, device=settings.device)
    copy = 2e-9 * source.numel() * 4 / _best(torch.Tensor.copy_, (torch.empty_like(source), source), short)
    del source
    n = MATMUL_SIZE[kind] // (2 if settings.quick else 1)
    matmul = {}
    for dtype in dict.fromkeys((settings.working_dtype, torch.float32)):
        a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        try:
            matmul[dtype_name(dtype)] = 2e-12 * n**3 / _best(torch.mm, (a, b), short)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return {"copy_gb_s": copy, "matmul_tflop_s": matmul, "copy_bytes": COPY_BYTES[kind], "matmul_size": n}


def _best(function: Any, inputs: tuple[Tensor, ...], settings: Settings) -> float:
    return min(interleave([Candidate("ceiling", function, inputs=inputs)], settings)[0]["ceiling"])


def line(limits: dict[str, Any]) -> str:
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in limits["matmul_tflop_s"].items())
    return f"this machine: copy {limits['copy_gb_s']:.4g} GB/s (reads and writes); matrix product {rates}"
