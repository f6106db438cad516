"""``scope_attention`` against PyTorch: what TivTok, InfoTok, HunyuanVideo's mid-block and VidTok's attend to.

Peers: *eager*, scaled_dot_product_attention under a dense boolean mask that exists already, as the models
ship it (per frame: frames folded into the batch, without a mask); *FlexAttention* under ``torch.compile``,
its block mask built before. What building that mask and compiling took is among the facts, and
*FlexAttention, fresh mask* builds it in each call, as for a new length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, compiled, dtype_name
from vtok_fast.bench.own import Own, megabytes
from vtok_fast.bench.pairs import undone
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope

ROWS = 64  # queries that are compared with float64
PEERS = "eager (dense mask); FlexAttention; FlexAttention, fresh mask (floor)"


@dataclass(frozen=True)
class Case:
    """``kind`` with its numbers, and (heads, head size). ``backward`` times both directions."""

    model: str
    kind: str
    numbers: tuple[int, ...]
    heads: int
    dim: int
    backward: bool = False
    flex: bool = False
    full: bool = False
    batch: int = 1

    def __str__(self) -> str:
        heads = f"{self.heads}x{self.dim}" if self.batch == 1 else f"{self.batch}x{self.heads}x{self.dim}"
        return (
            f"{self.model} {'x'.join(map(str, self.numbers))} {heads}{' backward' if self.backward else ''}"
        )

    def scope(self) -> Scope:
        if self.kind == "time invariant":
            tiv, tv, patches, slices = self.numbers
            return Scope.time_invariant(tiv=tiv, tv=tv, patches=patches, slices=slices)
        return (
            Scope.block_causal(*self.numbers)
            if self.kind == "block causal"
            else Scope.per_frame(*self.numbers)
        )

    def sees(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same as a formula of positions, for FlexAttention."""
        if self.kind == "time invariant":
            tiv, tv, patches, _ = self.numbers

            def arrow(q: Tensor, k: Tensor) -> Tensor:
                return (q < tiv) | (k < tiv) | ((q - tiv) // (tv + patches) == (k - tiv) // (tv + patches))

            return arrow
        n = self.numbers[1]
        return (
            (lambda q, k: q // n >= k // n)
            if self.kind == "block causal"
            else (lambda q, k: q // n == k // n)
        )


KINDS = ("time invariant", "block causal", "per frame")
_CASES = [
    Case("tivtok-t128", "time invariant", (96, 8, 1024, 4), 12, 64, flex=True),
    Case("tivtok-t128", "time invariant", (96, 8, 1024, 4), 12, 64, backward=True),
    Case("tivtok-t512", "time invariant", (384, 32, 1024, 4), 12, 64),
    Case("tivtok-t1024", "time invariant", (768, 64, 1024, 4), 12, 64),
    Case("tivtok-t128", "time invariant", (128, 8, 1024, 8), 12, 64, full=True),
    Case("infotok", "block causal", (9, 1024), 32, 8, flex=True),
    Case("hunyuanvideo 17x240x416", "block causal", (5, 1560), 1, 512, flex=True),
    Case("hunyuanvideo 17x480x832", "block causal", (5, 6240), 1, 512, full=True),
    Case("vidtok", "per frame", (5, 1024), 1, 512),
]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        small = {"time invariant": (24, 4, 64, 4), "block causal": (4, 64), "per frame": (5, 64)}
        return [
            replace(c, numbers=small[c.kind], heads=min(c.heads, 2))
            for c in (_CASES[0], _CASES[1], _CASES[5], _CASES[-1])
        ]
    return [c for c in _CASES if settings.full or not c.full]


def own(wish: Own) -> Case:
    wish.only("scope_attention", "kind", "numbers")
    batch, heads, tokens, dim = wish.sizes("B,heads,tokens,head size")
    kind = wish.one_of("kind", KINDS, "block causal")
    wanted = "tiv,tv,patches,slices" if kind == "time invariant" else "frames,tokens per frame"
    if wish.numbers is None or len(wish.numbers) != len(wanted.split(",")):
        raise ValueError(f"numbers={wish.numbers}: {kind} expects {wanted}")
    case = Case("own", kind, wish.numbers, heads, dim, flex=wish.compile, batch=batch)
    if case.scope().q_len != tokens:
        raise ValueError(
            f"shape={','.join(map(str, wish.shape))}: {kind} of {wish.numbers} has {case.scope().q_len} "
            f"tokens"
        )
    return case


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def folded(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """Frames in the batch: (B, heads, frames * n, D) as (B * frames, heads, n, D)."""
    batch = q.shape[0]
    q, k, v = (t.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).unflatten(0, (batch, frames)).transpose(1, 2).flatten(2, 3)


def with_gradients(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(attend(*inputs), inputs, grad)


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor, facts: dict, missing: dict) -> list[Candidate]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sees, length = case.sees(), q.shape[2]

    def block_mask():
        return create_block_mask(
            lambda b, h, i, j: sees(i, j), None, None, length, length, device=str(q.device)
        )

    start = time.perf_counter()
    mask = block_mask()
    facts["flex_mask_seconds"] = time.perf_counter() - start
    fast, why = compiled(lambda q, k, v, m: flex_attention(q, k, v, block_mask=m), q, k, v, mask)
    facts["flex_compile_seconds"] = time.perf_counter() - start - facts["flex_mask_seconds"]
    if fast is None:
        missing["FlexAttention"] = why
        return []
    return [
        Candidate("FlexAttention", partial(_run_flex, fast, mask), inputs=(q, k, v)),
        Candidate(
            "FlexAttention, fresh mask",
            lambda q, k, v: fast(q, k, v, block_mask()),
            "floor",
            inputs=(q, k, v),
        ),
    ]


def _run_flex(fast: Callable[..., Tensor], mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fast(q, k, v, mask)


def build(case: Case, settings: Settings) -> Trial:
    torch.manual_seed(0)
    dtype, scope = settings.working_dtype, case.scope().to(settings.device)
    # As a projection gives them: heads beside each other in memory.
    qkv = torch.randn(case.batch, scope.q_len, 3, case.heads, case.dim, device=settings.device).to(dtype)
    inputs = q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if case.kind == "per frame" else scope.mask()
    eager = partial(folded, frames=case.numbers[0]) if mask is None else partial(masked, mask=mask)
    attend = {"eager": eager, "ours": partial(scope_attention, scope=scope)}
    facts = {
        "queries": scope.q_len,
        "density": scope.density(),
        "dtype": dtype_name(dtype),
        "megabytes": megabytes(q, k, v, q),
        "gflop": case.batch * scope.flops(case.dim, heads=case.heads) / 1e9,
    }
    if case.backward:
        inputs = (q, k, v, torch.randn_like(q))
        facts["gflop"] += case.batch * scope.flops(case.dim, heads=case.heads, backward=True) / 1e9
        facts["megabytes"] += megabytes(*inputs, q, q, q)
    calls = {
        role: partial(with_gradients, function) if case.backward else function
        for role, function in attend.items()
    }
    candidates = [
        Candidate("eager", calls["eager"], "eager", inputs=inputs),
        Candidate("vtok_fast", calls["ours"], "ours", inputs=inputs),
    ]
    choices = ["a program for each block", "a product for the scale", "whole steps for what is left"]
    choices += ["large heads in chunks"] * (case.dim > 128)
    candidates += undone("scope_attention", candidates[1], settings, *choices)
    missing: dict[str, str] = {}
    if case.flex and not settings.compile:
        missing["FlexAttention"] = "not asked for"
    elif case.flex:
        candidates += _flex(case, q, k, v, facts, missing)
    facts["backend"] = backend_of(candidates[1].call)

    rows = torch.randperm(scope.q_len, device=q.device)[:ROWS]
    exact = masked(
        *(t.double() for t in (q[:, :, rows], k, v)), (scope.mask() if mask is None else mask)[rows]
    )
    result, theirs = (function(q, k, v)[:, :, rows] for function in (attend["ours"], eager))
    measured = parity.close(result, exact, theirs)
    facts |= {
        "error": parity.relative_errors(result, exact)["whole"],
        "eager_error": parity.relative_errors(theirs, exact)["whole"],
    }
    wrong = None if measured.ok else f"not close: {measured}"
    if case.backward and wrong is None:
        for name, mine, other in zip("qkv", candidates[1].call(), candidates[0].call()):
            # Twice the allowance, because both round; in bfloat16 several roundings follow each other.
            allowed = 2 * parity.floor(q.dtype) if q.dtype == torch.float32 else 2e-2
            if (mine - other).norm() > allowed * other.norm():
                wrong = f"the gradient of {name} differs from eager's"
    return Trial(str(case), case.kind, candidates, facts, missing, wrong)
