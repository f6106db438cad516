"""A gradient runs on the backend that the caller of the forward pass chose: at the call, by `with
backend(...)` or in the environment, whatever thread runs the backward pass, under activation checkpointing
and compilation too."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vtok_fast
from vtok_fast.dispatch import backends

SCOPE = vtok_fast.Scope.time_invariant(tiv=4, tv=2, patches=6, slices=2)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def conv(x, w, b, **how):
    return vtok_fast.causal_conv3d(x, w, b, activation="silu", time_mode="replicate", **how)


def norm(x, w, b, **how):
    return vtok_fast.norm_act(x, w, b, kind="group", groups=2, activation="silu", **how)


def fsq(z, **how):
    return vtok_fast.fsq_quantize(z, (8, 5, 5), **how).codes


def attention(q, k, v, **how):
    return vtok_fast.scope_attention(q, k, v, SCOPE, **how)


KEEP = torch.arange(24).view(1, 2, 3, 4) % 3 > 0
PACKED = vtok_fast.pack_tokens(torch.zeros(1, 5, 2, 3, 4), KEEP)


def pack(x, **how):
    return vtok_fast.pack_tokens(x, KEEP, **how).values


def unpack(values, **how):
    return vtok_fast.unpack_tokens(PACKED.with_values(values), **how)


# The function, its inputs, and the ops that its gradient may select.
CASES: dict[str, tuple[Callable, Callable, set[str]]] = {
    "causal_conv3d": (
        conv,
        lambda: (leaf(1, 8, 3, 6, 6), leaf(8, 8, 3, 3, 3), leaf(8)),
        {"causal_conv3d", "causal_conv3d_backward"},
    ),
    "norm_act": (norm, lambda: (leaf(1, 8, 3, 4, 4), leaf(8), leaf(8)), {"norm_act_backward"}),
    "fsq": (fsq, lambda: (leaf(2, 3, 2, 4, 4),), {"fsq_backward"}),
    "scope_attention": (
        attention,
        lambda: tuple(leaf(1, 2, SCOPE.q_len, 8) for _ in range(3)),
        {"scope_attention_backward"},
    ),
    "pack_tokens": (pack, lambda: (leaf(1, 5, 2, 3, 4),), {"unpack_tokens"}),
    "unpack_tokens": (unpack, lambda: (leaf(int(KEEP.sum()), 5),), {"pack_tokens"}),
}


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, str]]:
    """(op, backend) of everything that runs. Every op also has a backend "triton" here, the reference under
    another name: what a GPU would choose."""
    found: list[tuple[str, str]] = []

    def recorded(op: str, backend: backends.Backend) -> backends.Backend:
        def run(call, *args):
            found.append((op, backend.name))
            return backend.run(call, *args)

        return dataclasses.replace(backend, run=run)

    for op, candidates in list(backends._ops.items()):
        fake = dataclasses.replace(candidates[-1], name="triton", needs_native=False)
        others = [b for b in candidates if b.name not in ("triton", "sm80", "sm90")]
        monkeypatch.setitem(backends._ops, op, tuple(recorded(op, b) for b in (fake, *others)))
    return found


def in_thread(function: Callable) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


CHOICES = ("triton", "cpu", "reference")


def expected(op: str, choice: str) -> str:
    """Where an op has no such backend, automatic choice finds another: the fake in front."""
    return choice if any(b.name == choice for b in backends._ops[op]) else "triton"


def check(ran: list, of: set[str], choice: str) -> None:
    assert {op for op, _ in ran} & of, f"no gradient was selected: {ran}"
    for op, name in ran:
        assert name == expected(op, choice), (op, name, choice)


@pytest.mark.needs_native
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_the_choice_reaches_the_gradient(name, choice, ran, monkeypatch):
    function, make, of = CASES[name]
    for how in ("argument", "block", "environment"):
        inputs = make()
        if how == "argument":
            y = function(*inputs, backend=choice)
        elif how == "block":
            with vtok_fast.backend(choice):
                y = function(*inputs)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(backends, "_environment_backend", choice)
                y = function(*inputs)
        assert (name, choice) in ran
        ran.clear()
        y.square().sum().backward()
        check(ran, of, choice)
        gradients = [t.grad for t in inputs]
        ran.clear()
        again = [t.detach().requires_grad_() for t in inputs]
        y = function(*again, backend=choice)
        ran.clear()
        in_thread(lambda y=y: y.square().sum().backward())
        check(ran, of, choice)
        assert all(torch.equal(t.grad, g) for t, g in zip(again, gradients))
        ran.clear()


@pytest.mark.needs_native
@pytest.mark.parametrize("name", CASES)
def test_no_choice_is_automatic_whatever_surrounds_the_backward_pass(name, ran):
    function, make, of = CASES[name]
    y = function(*make())
    ran.clear()
    with vtok_fast.backend("reference"):
        y.square().sum().backward()
    check(ran, of, "triton")


@pytest.mark.needs_native
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_activation_checkpointing(name, choice, ran):
    function, make, of = CASES[name]
    inputs = make()
    with vtok_fast.backend(choice):
        y = checkpoint(lambda *tensors: function(*(1 * t for t in tensors)), *inputs, use_reentrant=False)
        z = checkpoint(lambda *tensors: function(*(1 * t for t in tensors), backend="reference"), *inputs,
                       use_reentrant=False)  # fmt: skip
    ran.clear()
    in_thread(lambda: y.sum().backward())
    check(ran, of | {name}, choice)
    ran.clear()
    in_thread(lambda: z.sum().backward())
    check(ran, of | {name}, "reference")


@pytest.mark.needs_native
@pytest.mark.parametrize("name", ("causal_conv3d", "norm_act", "fsq", "scope_attention"))
def test_compiled(name, ran):
    function, make, of = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(*t), fullgraph=True, backend="aot_eager")
    for choice in ("reference", "triton", "cpu"):
        inputs = make()
        with vtok_fast.backend(choice):
            y = compiled(*inputs)
        assert (name, choice) in ran
        ran.clear()
        in_thread(lambda y=y: y.square().sum().backward())
        check(ran, of, choice)
        ran.clear()


@pytest.mark.needs_native
def test_the_algorithm_reaches_the_gradient(monkeypatch):
    """The gradient of the input is a convolution, which the CPU computes by several algorithms."""
    from vtok_fast.ops.causal_conv3d import cpu

    seen = []
    algorithm = cpu._algorithm
    monkeypatch.setattr(cpu, "_algorithm", lambda call: seen.append(algorithm(call)) or seen[-1])
    x, w = leaf(1, 16, 2, 12, 12), leaf(16, 16, 3, 3, 3)
    with vtok_fast.algorithm("winograd4"):
        y = vtok_fast.causal_conv3d(x, w, backend="cpu")
    in_thread(lambda: y.sum().backward())
    assert seen == ["winograd4"] * 2
