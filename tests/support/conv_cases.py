"""Calls of causal_conv3d that several test modules run, and what their results are compared with."""

import pytest
import torch

from vtok_fast import parity
from vtok_fast.ops.causal_conv3d import op
from vtok_fast.reference.causal_conv3d import upsample_nearest

BF16 = torch.bfloat16
LAST = torch.channels_last_3d
ONE = ((1, 1), (1, 1))
MODES = {"zeros": 0, "replicate": 1, "reflect": 2}


def laid_out(r, t):
    """The same values with other strides: channels first, channels last, permuted, a slice, every other
    element."""
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
    """Keyword arguments of the reference and the output's (To, Ho, Wo), or None where the draw has no
    output."""
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
    time_mode, spatial_mode = (
        r.choice(["zeros", "replicate"] + ["reflect"] * (cache is None)),
        r.choice(list(MODES)),
    )
    frames = (T - 1) * upsample[0] + (1 if once else upsample[0])
    for i, (mode, n) in enumerate(
        ((time_mode, frames), (spatial_mode, H * upsample[1]), (spatial_mode, W * upsample[2]))
    ):
        if mode == "reflect":
            pad[2 * i], pad[2 * i + 1] = min(pad[2 * i], n - 1), min(pad[2 * i + 1], n - 1)
    out = [
        (n + pad[2 * i] + pad[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, n in enumerate((frames, H * upsample[1], W * upsample[2]))
    ]
    if min(out) < 1:
        return None
    residual, alpha = None, None
    if r.random() < 0.4:
        residual = torch.randn(batch, outputs, *out)
        small = torch.randn(batch, outputs, T, H, W)
        if upsample_nearest(small, upsample, once).shape == residual.shape and r.random() < 0.7:
            residual = small
        alpha = r.choice([None, 0.3])
    weight = (
        torch.randn(outputs, channels // groups, *kernel)
        / (channels // groups * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    )
    return dict(
        x=x,
        weight=weight,
        bias=torch.randn(outputs) if r.random() < 0.7 else None,
        stride=stride,
        dilation=dilation,
        groups=groups,
        time_pad=tuple(pad[:2]),
        spatial_pad=(tuple(pad[2:4]), tuple(pad[4:])),
        time_mode=time_mode,
        spatial_mode=spatial_mode,
        cache=cache,
        residual=residual,
        alpha=alpha,
        activation=r.choice([None, "silu"]),
        upsample=upsample,
        upsample_first_frame_once=once,
    ), tuple(out)


def drawn(channels, outputs, kernel, size, dtype, batch=1, seed=0, groups=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=g).to(dtype).contiguous(memory_format=LAST)
    fan_in = channels // groups * kernel[0] * kernel[1] * kernel[2]
    weight = (torch.randn(outputs, channels // groups, *kernel, generator=g) / fan_in**0.5).to(dtype)
    return x, weight, torch.randn(outputs, generator=g).to(dtype)


def checked_call(x, weight, bias=None, **options):
    """The ConvCall that the public function would make of these arguments."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "run", lambda call, backend: made.append(call) or torch.empty(1))
        op.causal_conv3d(x, weight, bias, **options)
    return made[0]


def in_double(call):
    return call._replace(**{k: v.double() for k, v in call._asdict().items() if isinstance(v, torch.Tensor)})


def close(y, call, same_dtype=None):
    want = op.run_reference(in_double(call))
    found = parity.close(y, want, op.run_reference(call) if same_dtype is None else same_dtype)
    assert found.ok, found
    assert y.is_contiguous(memory_format=LAST)


KERNELS = {
    "pointwise": ((1, 1, 1), {}),
    "plane": ((1, 3, 3), {}),
    "time": ((3, 1, 1), {"time_mode": "replicate"}),
    "two caches, short": ((3, 3, 3), {"cache": 1}),
    "replicated short cache": ((3, 1, 3), {"cache": 1, "time_mode": "replicate"}),
    "long cache": ((3, 1, 1), {"cache": 4}),
    "replicate everywhere": (
        (3, 3, 3),
        {"time_mode": "replicate", "spatial_mode": "replicate", "time_pad": (1, 1)},
    ),
    "reflect everywhere": ((3, 3, 3), {"time_mode": "reflect", "spatial_mode": "reflect"}),
    "stride 2": ((3, 3, 3), {"stride": 2, "spatial_pad": ((0, 1), (0, 1)), "time_pad": (1, 0)}),
    "dilation": ((3, 3, 3), {"dilation": 2}),
    "large": ((7, 7, 7), {}),
    "no padding": ((2, 3, 2), {"time_pad": (0, 0), "spatial_pad": ((0, 0), (0, 0))}),
    "upsampled": ((3, 3, 3), {"upsample": (2, 2, 2)}),
    "first frame once": (
        (3, 1, 3),
        {"upsample": (2, 1, 2), "upsample_first_frame_once": True, "time_mode": "replicate"},
    ),
    "upsampled cache": ((3, 1, 1), {"upsample": (2, 1, 1), "cache": 2}),
    "upsampled short cache": ((4, 2, 1), {"upsample": (2, 1, 1), "cache": 1, "time_mode": "replicate"}),
    "upsampled by 3, other pads": (
        (2, 5, 3),
        {"upsample": (1, 3, 2), "spatial_mode": "replicate", "spatial_pad": ((1, 4), (0, 1))},
    ),
    "upsampled and reflected": ((1, 3, 3), {"upsample": (1, 2, 2), "spatial_mode": "reflect"}),
    "upsampled, stride 2": ((2, 3, 3), {"upsample": (2, 2, 2), "stride": (1, 2, 1), "spatial_pad": ONE}),
    "first frame once, zeros": ((3, 1, 1), {"upsample": (3, 1, 1), "upsample_first_frame_once": True}),
    "depth to space": ((1, 3, 3), {"depth_to_space": (1, 2, 2)}),
    "depth to space in time": ((3, 1, 1), {"depth_to_space": (2, 1, 2)}),
    "two groups": ((3, 1, 3), {"groups": 2}),
    "groups of 4": ((1, 3, 3), {"groups": 8}),
    "depthwise": ((1, 2, 2), {"groups": 32, "spatial_pad": ((0, 0), (0, 0))}),
}


def make_call(kernel, options, dtype, channels=32, outputs=64, size=(4, 8, 7)):
    options = dict(options)
    cache = options.pop("cache", 0)
    x, weight, bias = drawn(channels, outputs, kernel, size, dtype, batch=2, groups=options.get("groups", 1))
    if cache:
        options["cache"] = drawn(channels, 1, (1, 1, 1), (cache, *size[1:]), dtype, batch=2, seed=1)[0]
    return checked_call(x, weight, bias, **options)


def expected_gradients(call, grad):
    """Autograd through the reference, in the dtype of the call: of x, weight, bias and cache."""
    leaves = [
        t if t is None else t.detach().clone().requires_grad_()
        for t in (call.x, call.weight, call.bias, call.cache)
    ]
    linear = call._replace(
        x=leaves[0],
        weight=leaves[1],
        bias=leaves[2],
        cache=leaves[3],
        residual=None,
        alpha=None,
        activation=None,
        depth_to_space=(1, 1, 1),
    )
    op.run_reference(linear).backward(grad.to(call.x.dtype))
    return [t if t is None else t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]
