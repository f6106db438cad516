"""The direct convolution of every instruction set against float64, over random shapes, memory layouts and
dtypes."""

import random

import pytest
import torch
from support.conv_cases import laid_out, random_call

from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d.call import Geometry
from vtok_fast.reference.causal_conv3d import causal_conv3d as reference

lib = native.lib()
pytestmark = pytest.mark.needs_native
DIRECT = 1
CASES_PER_TEST = 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_direct_against_float64(isa, dtype):
    r = random.Random(f"{isa} {dtype}")
    torch.manual_seed(0)
    done = 0
    while done < CASES_PER_TEST:
        drawn = random_call(r)
        if drawn is None:
            continue
        done += 1
        call, size = drawn
        call = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        want = reference(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()})
        x, weight, cache = (
            None if call[k] is None else laid_out(r, call[k]) for k in ("x", "weight", "cache")
        )
        residual = call["residual"]
        if residual is not None:  # the kernel wants its channels adjacent
            residual = residual.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
        # A wider pixel than the output needs: what lies beside it must stay as it was.
        wide = torch.full((x.shape[0], *size, weight.shape[0] + 2), 7.0, dtype=dtype)
        out = wide[..., 1:-1].permute(0, 4, 1, 2, 3)
        pad = (*call["time_pad"], *call["spatial_pad"][0], *call["spatial_pad"][1])
        lib.causal_conv3d(
            *map(native.arg, (x, weight, call["bias"], cache, residual, out)),
            Geometry(pad=pad, **{name: call[name] for name in Geometry._fields if name != "pad"}).native(),
            call["alpha"],
            call["activation"] == "silu",
            DIRECT,
            r.choice([1, 2]),
        )
        # The close contract: 16 eps of float32, plus half an eps of a narrower output.
        bound = 16 * torch.finfo(torch.float32).eps + (
            0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        )
        about = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        assert (out.double() - want).norm() <= bound * want.norm(), about
        assert (wide[..., 0] == 7).all() and (wide[..., -1] == 7).all(), about
