"""The direct convolution of every instruction set against float64, over random shapes, memory layouts and dtypes."""

import random

import pytest
import torch

from vtok_fast import native
from vtok_fast.reference.causal_conv3d import causal_conv3d as reference
from vtok_fast.reference.causal_conv3d import upsample_nearest

lib = native.lib()
pytestmark = pytest.mark.skipif(lib is None, reason=f"{native.why_missing()}")
MODES = {"zeros": 0, "replicate": 1, "reflect": 2}
DIRECT = 1
CASES_PER_TEST = 40


@pytest.fixture(params=[] if lib is None else lib.supported_isas())
def isa(request):
    before = lib.isa()
    lib.set_isa(request.param)
    yield request.param
    lib.set_isa(before)


def laid_out(r, t):
    """The same values with other strides: channels first, channels last, permuted, a slice, every other element."""
    kind = r.choice(["first", "last", "last", "permuted", "slice", "every other"])
    if kind == "first":
        return t.contiguous()
    if kind == "last":
        return t.contiguous(memory_format=torch.channels_last_3d)
    if kind == "permuted":
        order = r.sample(range(5), 5)
        return t.permute(order).contiguous().permute([order.index(i) for i in range(5)])
    step = 1 if kind == "slice" else 2
    view = torch.empty([n * step + 1 for n in t.shape], dtype=t.dtype)[(slice(1, None, step),) * 5]
    return view.copy_(t)


def random_call(r):
    """Keyword arguments of the reference and the output's (To, Ho, Wo), or None where the draw has no output."""
    groups = r.choice([1, 1, 1, 1, 2, 3])
    channels = groups * r.choice([1, 2, 3, 5, 8, 12, 16, 17, 33, 64])
    outputs = groups * r.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 48, 70])
    kernel = [r.choice([1, 2, 3, 3]), r.choice([1, 2, 3, 3, 5]), r.choice([1, 2, 3, 3, 5])]
    stride, dilation = [tuple(r.choice([1, 1, 1, 2, 3 - i]) for _ in range(3)) for i in (0, 1)]
    upsample = r.choice([(1, 1, 1)] * 3 + [(2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 2), (4, 1, 2)])
    usual = (r.choice([1, 2]), r.choice([1, 2, 5]), 1, r.randint(1, 12), r.randint(1, 17))
    size = r.choice([(2, 30, 1, 1, 1), (1, 1, 1, 9, 40)] + [usual] * 6)
    batch, T, _, H, W = size
    x = torch.randn(batch, channels, T, H, W)
    cache = torch.randn(batch, channels, r.choice([1, 2, 3]), H, W) if r.random() < 0.4 else None
    once = cache is None and r.random() < 0.3
    pad = [r.choice([0, 1, 2, 3]) for _ in range(6)]
    time_mode, spatial_mode = r.choice(["zeros", "replicate"] + ["reflect"] * (cache is None)), r.choice(list(MODES))
    frames = (T - 1) * upsample[0] + (1 if once else upsample[0])
    for i, (mode, n) in enumerate(((time_mode, frames), (spatial_mode, H * upsample[1]), (spatial_mode, W * upsample[2]))):
        if mode == "reflect":
            pad[2 * i], pad[2 * i + 1] = min(pad[2 * i], n - 1), min(pad[2 * i + 1], n - 1)
    out = [(n + pad[2 * i] + pad[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
           for i, n in enumerate((frames, H * upsample[1], W * upsample[2]))]
    if min(out) < 1:
        return None
    residual, alpha = None, None
    if r.random() < 0.4:
        residual = torch.randn(batch, outputs, *out)
        small = torch.randn(batch, outputs, T, H, W)
        if upsample_nearest(small, upsample, once).shape == residual.shape and r.random() < 0.7:
            residual = small
        alpha = r.choice([None, 0.3])
    weight = torch.randn(outputs, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    return dict(x=x, weight=weight, bias=torch.randn(outputs) if r.random() < 0.7 else None, stride=stride, dilation=dilation,
                groups=groups, time_pad=tuple(pad[:2]), spatial_pad=(tuple(pad[2:4]), tuple(pad[4:])), time_mode=time_mode,
                spatial_mode=spatial_mode, cache=cache, residual=residual, alpha=alpha,
                activation=r.choice([None, "silu"]), upsample=upsample, upsample_first_frame_once=once), tuple(out)


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
        x, weight, cache = (None if call[k] is None else laid_out(r, call[k]) for k in ("x", "weight", "cache"))
        residual = call["residual"]
        if residual is not None:  # the kernel wants its channels adjacent
            residual = residual.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
        # A wider pixel than the output needs: what lies beside it must stay as it was.
        wide = torch.full((x.shape[0], *size, weight.shape[0] + 2), 7.0, dtype=dtype)
        out = wide[..., 1:-1].permute(0, 4, 1, 2, 3)
        pad = (*call["time_pad"], *call["spatial_pad"][0], *call["spatial_pad"][1])
        lib.causal_conv3d(*map(native.arg, (x, weight, call["bias"], cache, residual, out)), call["stride"], call["dilation"],
                          call["groups"], pad, MODES[call["time_mode"]], MODES[call["spatial_mode"]], call["upsample"],
                          call["upsample_first_frame_once"], call["alpha"], int(call["activation"] is not None), DIRECT,
                          r.choice([1, 2]))
        # The close contract: 16 eps of float32, plus half an eps of a narrower output.
        bound = 16 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
        about = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        assert (out.double() - want).norm() <= bound * want.norm(), about
        assert (wide[..., 0] == 7).all() and (wide[..., -1] == 7).all(), about
