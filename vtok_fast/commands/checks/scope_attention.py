"""How the backends of ``scope_attention`` are compared."""

from __future__ import annotations

from vtok_fast.commands.checks.compare import Cases, closely, random
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope


def cases() -> Cases:
    scopes = {
        "time invariant": Scope.time_invariant(tiv=24, tv=4, patches=64, slices=3),
        "block causal": Scope.block_causal(4, 50),
        "packed": Scope.packed([0, 70, 70, 200], q_len=210),
    }
    return {
        name: (tuple(random(1, 4, scope.q_len, 32, seed=i) for i in range(3)), {"scope": scope})
        for name, scope in scopes.items()
    }


CHECKS = {"scope_attention": lambda op, backend: closely(op, backend, scope_attention, cases())}
