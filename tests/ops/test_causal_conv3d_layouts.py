"""Questions about a GPU's kernels copy no tensor: only a launch lays out what it must."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d import gradient, launch, sm90, sm90_wgrad
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Geometry

BF16 = torch.bfloat16


class Copies(TorchDispatchMode):
    """Counts operations that write a tensor of the call's type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        empty = func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
        if not empty and isinstance(result, torch.Tensor) and result.dtype == BF16 and not result.is_meta:
            self.found.append(str(func))
        return result


class Native:
    """A native module that would run everything, and keeps what it was asked."""

    cuda_archs = ("80", "90a")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def launcher(*args: Any) -> None:
            self.asked.append((name, *args))

        launcher.__name__ = name
        return launcher


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Native:
    stub = Native()
    monkeypatch.setattr(native, "lib", lambda: stub)
    for module in (launch, gradient):
        monkeypatch.setattr(module, "why_not_machine", lambda x: None)
    monkeypatch.setattr(sm90, "why_not_machine", lambda x: None)
    monkeypatch.setattr(gradient.sm80, "why_not", lambda call: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for clear in (launch._why_refused.cache_clear, sm90._calls.clear):
        clear()
    yield stub
    for clear in (launch._why_refused.cache_clear, sm90._calls.clear):
        clear()


def planar(*shape: int) -> torch.Tensor:
    """NCDHW, which the kernels do not read."""
    return torch.zeros(shape, dtype=BF16)


@pytest.mark.parametrize("cached", [False, True])
def test_a_question_copies_nothing(lib: Native, cached: bool) -> None:
    x, weight = planar(1, 32, 3, 8, 8), planar(16, 32, 3, 3, 3)
    cache = planar(1, 32, 2, 8, 8) if cached else None
    residual = planar(1, 16, 3, 8, 8)
    geometry = Geometry(pad=(2, 0, 1, 1, 1, 1))
    call = ConvCall(x, weight, None, cache, residual, geometry)
    backward = ConvBackwardCall(
        planar(1, 16, 3, 8, 8), x, weight, cache, geometry, (True, True, True, cached)
    )
    with Copies() as copies:
        assert sm90.why_not(call) is None
        assert gradient._why_not_sm90(backward) is None
    assert not copies.found, copies.found
    # The same strides as the launch itself then hands over.
    asked, lib.asked = lib.asked, []
    sm90.forward(call, call.empty_output(), lib=lib)
    laid_out = gradient._as_read(backward)
    sm90_wgrad.wgrad(laid_out, torch.empty_like(weight), None, lib=lib)
    sm90.dgrad(laid_out, torch.empty_like(laid_out.x), laid_out.cache, lib=lib)
    launched = {name: args for name, *args in lib.asked}

    def layouts(args: Any) -> list[Any]:
        return [a[1:] for a in args if isinstance(a, tuple) and len(a) == 4 and isinstance(a[2], torch.Size)]

    assert {name for name, *_ in asked} == set(launched)
    for name, *args in asked:
        tensors = {"causal_conv3d_sm90_wgrad": 4}.get(name, 5)
        assert layouts(args)[: tensors - (not cached)] == layouts(launched[name])[: tensors - (not cached)], (
            name
        )


def test_what_is_laid_out_already_is_described_by_itself() -> None:
    x = planar(1, 32, 3, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert launch.channels_last(x, copied=False) is x and launch.laid_out(x, copied=False) is x
    crop = x[:, :, :, 1:, 2:]
    assert launch.channels_last(crop, copied=False) is crop
    described = launch.laid_out(crop, copied=False)
    assert described.device.type == "meta" and described.stride() == launch.laid_out(crop, True).stride()


def test_a_question_is_asked_once_for_what_decides_it(lib: Native) -> None:
    """The same for other contents; again for another layout, alignment or activation."""
    memory = torch.zeros(1 << 16, dtype=BF16)
    last = torch.channels_last_3d
    x = memory[: 32 * 192].view(1, 3, 8, 8, 32).permute(0, 4, 1, 2, 3)
    odd = memory[1 : 32 * 192 + 1].view(1, 3, 8, 8, 32).permute(0, 4, 1, 2, 3)
    weight = torch.zeros(16, 32, 3, 3, 3, dtype=BF16)
    call = ConvCall(x, weight, geometry=Geometry(pad=(2, 0, 1, 1, 1, 1)))
    asked = []
    for other in (
        call,
        call._replace(x=x.clone(memory_format=last)),
        call._replace(x=odd),
        call._replace(activation="silu"),
        call._replace(weight=weight.contiguous(memory_format=last)),
        call._replace(residual=torch.zeros(1, 16, 3, 8, 8, dtype=BF16)),
        call,
    ):
        assert sm90.why_not(other) is None
        asked.append(len(lib.asked))
    assert asked == [1, 1, 2, 3, 4, 5, 5]
