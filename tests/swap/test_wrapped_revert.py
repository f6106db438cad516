"""revert() under DDP and FSDP2: the model below the wrapper is as it was, and trains as one that was never
accelerated. One process, gloo."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from support.swap_contract import noise, randomize
from torch import nn

import vtok_fast
from vtok_fast.models import VidTok

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{os.fspath(tmp_path)}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of this torch (2.6) has no CPUs")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.mid.block_1, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model, z):
    model.zero_grad()
    y = model(z)
    y.square().mean().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return y.detach(), grads


@pytest.mark.volatile
@pytest.mark.parametrize("order", ("accelerate first", "wrap first"))
@pytest.mark.parametrize("wrap", (ddp, fsdp2), ids=("DDP", "FSDP2"))
def test_revert_under_a_wrapper(group, wrap, order):
    torch.manual_seed(0)
    model, z = randomize(VidTok("tiny")).decoder, noise(1, 6, 2, 4, 4)
    plain = copy.deepcopy(model)
    if order == "accelerate first":
        report = vtok_fast.accelerate(model, check=False)
    wrapped = wrap(model)
    if order == "wrap first":
        report = vtok_fast.accelerate(wrapped, check=False)
    want = step(plain, z)
    for _ in range(2):
        got = step(wrapped, z)
        torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-4)
    ran = sum(report.ran().values())
    assert report.swapped and report.active and ran
    report.revert()
    assert not report.active and not any("forward" in m.__dict__ for m in model.modules())
    got = step(wrapped, z)
    assert torch.equal(got[0], want[0]) and sum(report.ran().values()) == ran
    for a, b in zip(got[1], want[1]):
        torch.testing.assert_close(a, b)
    again = vtok_fast.accelerate(wrapped, check=False)  # and may be accelerated again
    assert again.swapped
    step(wrapped, z)
    assert sum(again.ran().values())
