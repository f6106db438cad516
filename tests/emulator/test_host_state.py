"""Host code of the launchers against the state that the runtime and the driver keep: a context per thread, a
grant of shared memory per kernel and device, refusals."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from support import emulator
from support.conv_cases import checked_call, close, drawn
from support.conv_sm90_emulated import Emulated, compiled

from vtok_fast.ops.causal_conv3d import sm90, sm90_wgrad
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall

pytestmark = pytest.mark.needs_emulator
LAST = torch.channels_last_3d
BF16 = torch.bfloat16


@functools.cache
def host() -> emulator.Library:
    return emulator.build(
        "tests/emulator/host_threads.cu",
        "csrc/cuda/device.cu",
        includes=["cuda/device.h"],
        exports={n: f"vtok::cuda::{n}" for n in ("two_threads", "one_launch", "cold_encode")},
        glue="namespace vtok::cuda { Status two_threads(const Tensor&, int, int, bool, Queue);\n"
        "Status one_launch(const Tensor&, Queue); Status cold_encode(const Tensor&, bool, Queue); }",
    )


def in_a_thread(function: Any, *args: Any) -> Any:
    """The result of a call in a thread that has done nothing on a device, or its exception."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((function(*args), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def of_weights() -> tuple[ConvBackwardCall, torch.Tensor, torch.Tensor]:
    x, weight, _ = drawn(16, 16, (1, 3, 3), (1, 8, 8), BF16)
    grad = drawn(16, 1, (1, 1, 1), (1, 8, 8), BF16, seed=1)[0]
    call = checked_call(x, weight, None)
    wanted = (False, True, True, False)
    return (
        ConvBackwardCall(grad, x, weight, None, call.geometry, wanted),
        torch.full_like(weight, torch.nan),
        torch.full((16,), torch.nan, dtype=BF16),
    )


def test_the_driver_refuses_a_thread_without_a_context():
    t = torch.zeros(4, 8)
    with pytest.raises(emulator.EmulatorError, match="driver's error 201"):
        host().cold_encode(t, False, (0, 0), capability=90)
    host().cold_encode(t, True, (0, 0), capability=90)


def test_first_call_of_a_cold_thread():
    """The plans are known already, the weights are read in place: nothing but the encoding of tensor maps
    comes before the launch. So it is for autograd's thread where a channels-last gradient arrives."""
    x, weight, bias = drawn(16, 16, (1, 3, 3), (2, 8, 8), BF16)
    call = checked_call(x, weight.contiguous(memory_format=LAST), bias)
    lib = Emulated(0)

    def forward() -> torch.Tensor:
        return sm90.forward(call, call.empty_output(), lib=lib)

    want = forward()
    assert torch.equal(in_a_thread(forward), want)
    close(want, call)
    backward, *into = of_weights()
    sm90_wgrad.wgrad(backward, *into, lib=lib)
    cold = [torch.full_like(t, torch.nan) for t in into]
    in_a_thread(lambda: sm90_wgrad.wgrad(backward, *cold, lib=lib))
    assert all(torch.equal(a, b) for a, b in zip(cold, into))


@pytest.mark.parametrize("device", [0, 1])
def test_the_device_that_is_named_gets_the_work(device):
    """A thread may have another one's context, or none."""
    out = torch.zeros(2, dtype=torch.int32)

    def work(*devices: int) -> int:
        for index in devices:
            host().one_launch(out, (index, 0))
        return host().last_device

    assert in_a_thread(work, device) == device
    assert in_a_thread(work, 1 - device, device) == device


def test_two_threads_with_different_amounts_of_shared_memory():
    """The emulator refuses what a launcher may not do: to grant each launch its exact need."""
    out = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(emulator.EmulatorError, match="92160 bytes of shared memory.*granted 61440"):
        host().two_threads(out, 60 << 10, 90 << 10, True, (0, 0))
    host().two_threads(out, 60 << 10, 90 << 10, False, (0, 0))
    assert out.tolist() == [1, 2]


def test_a_grant_and_a_look_up_are_made_once():
    x, weight, bias = drawn(16, 16, (1, 3, 3), (2, 8, 8), BF16)
    call = checked_call(x, weight.contiguous(memory_format=LAST), bias)
    sm90.forward(call, call.empty_output(), lib=Emulated(0))
    before = compiled().host_counts
    sm90.forward(call, call.empty_output(), lib=Emulated(0))
    after = compiled().host_counts
    made = {name: after[name] - before[name] for name in after}
    assert made["launches"] == 1 and made["attributes"] == made["look_ups"] == made["occupancies"] == 0, made


def test_what_the_driver_refuses_is_a_reason():
    """Before anything is launched, and where only a plan is asked for: another kernel then runs."""
    x, weight, bias = drawn(16, 16, (1, 3, 3), (2, 8, 8), BF16)
    call = checked_call(x, weight, bias)
    lib, (backward, *into) = Emulated(0), of_weights()
    with compiled().refusing(rank=5):
        launches = compiled().host_counts["launches"]
        with pytest.raises(
            NotImplementedError, match="sm90: the driver refuses a tensor map of size 16x8x8x2x1"
        ):
            sm90.plan(call, call.empty_output(device="meta"), lib=lib)
        with pytest.raises(NotImplementedError, match="sm90: the driver refuses"):
            sm90.forward(call, call.empty_output(), lib=lib)
        with pytest.raises(NotImplementedError, match="sm90: the driver refuses"):
            sm90_wgrad.plan(backward, lib=lib)
        with pytest.raises(NotImplementedError, match="sm90: the driver refuses"):
            sm90_wgrad.wgrad(backward, *into, lib=lib)
        assert compiled().host_counts["launches"] == launches
    close(sm90.forward(call, call.empty_output(), lib=lib), call)


@pytest.mark.parametrize("cluster", [1, 2])
def test_occupancy_is_a_hint(cluster):
    """It is asked for real clusters only, and the kernel runs where that is refused."""
    x, weight, bias = drawn(16, 16, (1, 3, 3), (2, 8, 9 + cluster), BF16)
    call = checked_call(x, weight, bias)
    with compiled().refusing(occupancy=True):
        asked = compiled().host_counts["occupancies"]
        y = sm90.forward(call, call.empty_output(), lib=Emulated(0), choice=(128, 64, 1, cluster, 0))
        assert compiled().host_counts["occupancies"] - asked == cluster - 1
    close(y, call)


def test_scratch_memory_is_asked_for_once():
    """A launcher that finds too little says how much it needs and launches nothing; the next call knows."""
    x, weight, bias = drawn(16, 24, (1, 3, 3), (2, 8, 11), BF16)
    call = checked_call(x, weight, bias)  # weights that must be relaid
    asked: list[int] = []

    class Counting(Emulated):
        def causal_conv3d_sm90(self, *args: Any) -> None:
            asked.append(args[-3][2][0])
            super().causal_conv3d_sm90(*args)

    lib = Counting(0)
    launches = compiled().host_counts["launches"]
    first = sm90.forward(call, call.empty_output(), lib=lib)
    again = sm90.forward(call, call.empty_output(), lib=lib)
    assert asked == [16, 24 * 9 * 16 * 2, 24 * 9 * 16 * 2]
    assert compiled().host_counts["launches"] - launches == 2 * 2  # relaid, multiplied
    assert torch.equal(first, again)
    close(first, call)
