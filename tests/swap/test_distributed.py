"""Accelerated models under DistributedDataParallel and FSDP2 on two processes, and under gradient
checkpointing."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import vtok_fast

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support import swap_contract as contract  # noqa: E402

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
KINDS = {
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        {
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "block_out_channels": (8, 16, 16, 16),
        },
    ),
    "Wan": ("AutoencoderKLWan", {"base_dim": 8, "num_res_blocks": 1}),
}
BLOCKS = ("CogVideoXResnetBlock3D", "WanResidualBlock")


class RoundTrip(nn.Module):
    """A video to its reconstruction: what is trained."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.decode(self.model.encode(x).latent_dist.mode()).sample


def make(kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return RoundTrip(contract.randomize(getattr(diffusers, name)(**options)))


def wrap(model, how):
    if how == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in [m for m in model.modules() if type(m).__name__ in BLOCKS]:
        fully_shard(block)
    fully_shard(model)
    return model


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads])


def train(rank, kind, how, order, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        x = contract.noise(2, 3, 5, 32, 32)[rank : rank + 1]
        # Not of one process alone: FSDP2 keeps only part of the gradients of blocks that Wan's loop over
        # chunks calls repeatedly.
        want = gradients(wrap(make(kind), how), x)
        model = make(kind)
        if order == "accelerate first":
            vtok_fast.accelerate(model, check=False)
        wrapped = wrap(model, how)
        if order == "wrap first":
            report = vtok_fast.accelerate(model, check=False)
            assert report.swapped
        for _ in range(2):
            got = gradients(wrapped, x)
            error = float((got - want).norm() / want.norm())
            assert got.shape == want.shape and error < 1e-4, error
    finally:
        dist.destroy_process_group()


@pytest.mark.volatile
@pytest.mark.parametrize("order", ("accelerate first", pytest.param("wrap first", marks=pytest.mark.slow)))
@pytest.mark.parametrize("how", ("DDP", "FSDP2"))
@pytest.mark.parametrize("kind", (pytest.param("CogVideoX", marks=pytest.mark.slow), "Wan"))
def test_gradients_of_two_processes(kind, how, order, tmp_path):
    if how == "FSDP2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of this torch (2.6) has no CPUs")
    mp.spawn(train, (kind, how, order, os.fspath(tmp_path)), nprocs=2)


def test_gradient_checkpointing():
    model, x = make("CogVideoX").train(), contract.noise(1, 3, 5, 32, 32)
    want = gradients(copy.deepcopy(model), x)
    vtok_fast.accelerate(model, check=False)
    model.model.enable_gradient_checkpointing()
    calls = []
    for part in model.model.modules():
        if getattr(part, "gradient_checkpointing", False):
            function = part._gradient_checkpointing_func
            part._gradient_checkpointing_func = lambda *a, f=function, **k: (calls.append(1), f(*a, **k))[1]
    got = gradients(model, x)
    assert calls
    assert (got - want).norm() <= 1e-4 * want.norm()
