#!/usr/bin/env bash
# DTensor: a convolution of a video that is sharded in time or space returns one rank's piece as the whole.
#
# One would guess: conv3d of a DTensor sharded along time, height or width exchanges the borders between
# ranks, or gathers first, or raises; full_tensor() then equals the plain convolution.
# What happens: each rank convolves its own piece, with zero padding at the cut, and the result is marked as
# replicated, with the whole video's shape. full_tensor() believes the mark: without an error it gives, under
# two ranks, half the video, in a shape that differs from the DTensor's own. Each rank holds another half.
# Sharding the batch is right. Exchange the borders by hand.
#
# Seen with: torch 2.13.0, gloo, two processes on CPU. Source: pytorch/pytorch issue 191926, pull requests
# 192147 and 186129 (a missing rule falls back to "replicated", in other layouts).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.2'
cat >run.py <<'PY'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def run(rank, store):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, 3, 3)
    weights = distribute_tensor(weight, mesh, [Replicate()])
    video = torch.randn(2, 4, 6, 8, 8)
    expected = F.conv3d(video, weight, padding=1)
    for dim, name in ((0, "batch"), (2, "time"), (3, "height"), (4, "width")):
        out = F.conv3d(distribute_tensor(video, mesh, [Shard(dim)]), weights, padding=1)
        full, claimed = out.full_tensor(), out.placements[0]
        if rank == 0:
            shapes = f"shape {tuple(out.shape)}, full_tensor {tuple(full.shape)}"
            print(f"sharded in {name:7} placement of the result {claimed}, {shapes}")
        assert out.shape == expected.shape, "the behavior has changed"
        if dim == 0:
            torch.testing.assert_close(full, expected)
            continue
        size = video.shape[dim] // 2
        piece = F.conv3d(video.narrow(dim, rank * size, size).contiguous(), weight, padding=1)
        assert claimed == Replicate() and full.shape == piece.shape, "the behavior has changed"
        torch.testing.assert_close(full, piece)
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"torch {torch.__version__}; one would guess full_tensor {(2, 4, 6, 8, 8)} in each case")
    mp.spawn(run, (os.path.abspath("store"),), nprocs=2)
PY
venv/bin/python run.py
