"""What an op computes once and keeps must not depend on the mode in which it is used first.

pytorch/ao #2286 and lucidrains/vector-quantize-pytorch #114 (tables in the default dtype);
sgl-project/sglang #33470 and pytorch/pytorch #136232 (state that inherits the mode or default device of its
first use); state-spaces/s4 #169 and pytorch/pytorch #161164 (inference tensors cannot be saved for backward).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

import vtok_fast
from vtok_fast.dispatch import lasting, native
from vtok_fast.ops.fsq.call import threshold_table

LEVELS = (8, 5, 5)


def leaf(*shape: int) -> torch.Tensor:
    """A CPU float32 leaf whatever the defaults are."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.randn(*shape, dtype=torch.float32).requires_grad_()


def every_op(scopes: dict, gradients: bool) -> list[torch.Tensor]:
    """Results (and gradients) of all ops; scopes are made at the first call and used again at the second."""
    torch.manual_seed(0)
    x, w, z = leaf(2, 8, 3, 6, 6), leaf(8, 8, 3, 3, 3), leaf(1, 3, 2, 4, 4)
    affine, q, video = leaf(8), leaf(1, 2, 12, 16), leaf(1, 3, 5, 16, 16)
    if not scopes:
        scopes["causal"] = vtok_fast.Scope.block_causal(3, 4)
        scopes["packed"] = vtok_fast.Scope.packed([0, 3, 3, 8], q_len=12)
        scopes["slices"] = vtok_fast.Scope.time_invariant(tiv=2, tv=1, patches=4, slices=2)
        scopes["gaps"] = vtok_fast.Scope.from_segments([(0, 4, [(0, 2), (5, 7), (9, 12)])], 12, 12)
    keep = torch.arange(2 * 3 * 6 * 6, device="cpu").view(2, 3, 6, 6) % 3 > 0
    found = []
    for mode in ("zeros", "replicate", "reflect"):
        for backend in ("cpu", "reference"):
            pads = {"time_mode": mode, "spatial_mode": mode, "time_pad": (1, 0), "backend": backend}
            found.append(vtok_fast.causal_conv3d(x, w, affine, activation="silu", **pads))
    for kind in ("layer", "rms", "group", "group_rms"):
        for backend in ("cpu", "reference"):
            found.append(
                vtok_fast.norm_act(x, affine, kind=kind, groups=2, activation="silu", backend=backend)
            )
    for backend in ("cpu", "reference"):
        codes, indices = vtok_fast.fsq_quantize(z, LEVELS, backend=backend)
        found += [codes, indices, vtok_fast.fsq_decode(indices, LEVELS)]
        for scope in scopes.values():
            rows = q[:, :, : scope.q_len]
            found.append(vtok_fast.scope_attention(rows, rows, rows, scope, backend=backend))
        packed = vtok_fast.pack_tokens(x, keep, backend=backend)
        found += [packed.values, vtok_fast.unpack_tokens(packed, fill=0.5, backend=backend)]
        found += [
            vtok_fast.pack_tokens(z, keep[:1, :2, :4, :4], levels=LEVELS, capacity=40, backend=backend).values
        ]
        scores = vtok_fast.router_scores(video, 0 * video, backend=backend)
        for method in ("topk", "threshold"):
            found.append(vtok_fast.select_tokens(scores, 3, method=method, backend=backend))
    found += list(vtok_fast.fsq_entropy_loss(z, LEVELS))
    found += [vtok_fast.token_budget(scores, 0.5, released=True)]
    found += [vtok_fast.token_budget(scores, 0.5, strategy="bin", elbo_mean=0.3)]
    if gradients:
        loss = sum(t.square().sum() for t in found if t.requires_grad)
        found += torch.autograd.grad(loss, (x, w, z, affine, q))
    return [t.detach() for t in found]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for i, (one, other) in enumerate(zip(a, b)):
        assert one.device.type == "cpu" and one.dtype == other.dtype and torch.equal(one, other), i


def in_thread(function: Callable) -> list[torch.Tensor]:
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(function()))
    thread.start()
    thread.join()
    return found


def first_in(mode: str) -> None:
    """Every op first in this mode, then as usual, with the same results."""
    scopes: dict = {}
    if mode in ("bfloat16", "float16", "float64"):
        torch.set_default_dtype(getattr(torch, mode))
        first = every_op(scopes, gradients=True)
        torch.set_default_dtype(torch.float32)
    elif mode == "default device":
        torch.set_default_device("meta")
        first = every_op(scopes, gradients=True)
        torch.set_default_device("cpu")
    elif mode == "device block":
        with torch.device("meta"):
            first = every_op(scopes, gradients=True)
    elif mode == "inference":
        with torch.inference_mode():
            first = every_op(scopes, gradients=False)
    else:
        first = in_thread(lambda: every_op(scopes, gradients=True))
    second = every_op(scopes, gradients=True)
    same(first, second)
    same(second, every_op({}, gradients=True))
    print("right")


MODES = ("bfloat16", "float16", "float64", "default device", "device block", "inference", "thread")


@pytest.mark.skipif(native.lib() is None, reason="needs the native module")
@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.slow] if m in ("float16", "float64") else []) for m in MODES]
)
def test_every_op_first_in(mode):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    run = subprocess.run(
        [sys.executable, __file__, mode], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0 and run.stdout.strip() == "right", (run.returncode, run.stderr[-2000:])


def test_a_model_that_was_evaluated_first_trains():
    model = vtok_fast.models.TivTok("tiny")
    frames, side = model.window[0], 2 * model.config.spatial_factor
    x = torch.rand(1, 3, frames // 8 if frames >= 64 else frames, side, side) * 2 - 1
    with torch.inference_mode():
        model.eval()(x)
    output = model.train()(x)
    reconstruction = output if isinstance(output, torch.Tensor) else output[0]
    reconstruction.square().mean().backward()


def test_no_pointer_of_another_device_reaches_a_kernel():
    """pytorch/pytorch #136232 ran under a default device: a kernel that reads such an address ends the
    process."""
    with pytest.raises(ValueError, match="reads memory on cpu was given a tensor on meta"):
        native.arg(torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="reads memory on meta was given a tensor on cpu"):
        native.arg_on(torch.device("meta"))(torch.empty(2))


def test_tables_are_ordinary_tensors():
    with torch.inference_mode(), torch.device("meta"), lasting.lasting():
        made = torch.ones(2)
    assert made.device.type == "cpu" and not made.is_inference()
    threshold_table.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        table = threshold_table((7, 3), "vidtok")
    assert table.device.type == "cpu" and table.dtype == torch.float32 and not table.is_inference()


if __name__ == "__main__":
    first_in(sys.argv[1])
