"""Transformations and derivatives beyond the first backward pass.

torch.func (pytorch/pytorch #60312: what a custom function must declare) and gradients of gradients, as R1 and
gradient penalties take them (pytorch/pytorch #1643; rosinality/style-based-gan-pytorch #89): right, and never
silently incomplete.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

import vtok_fast
from vtok_fast.dispatch import backends, native
from vtok_fast.ops.fsq.call import threshold_table
from vtok_fast.reference import fsq as fsq_reference

SCOPE = vtok_fast.Scope.from_segments([(1, 4, [(0, 2), (4, 6)]), (4, 6, [(2, 5)])], 7, 7)
KEEP = torch.arange(24).view(1, 2, 3, 4) % 3 > 0


def conv(x, w, b, cache, **how):
    options = {"time_mode": "replicate", "activation": "silu", "upsample": (1, 2, 1), **how}
    return vtok_fast.causal_conv3d(x, w, b, cache=cache, depth_to_space=(1, 1, 2), **options)


def strided(x, w, residual, **how):
    pads = {"spatial_pad": ((1, 0), (1, 0)), "spatial_mode": "reflect", "stride": (1, 2, 2), "groups": 2}
    return vtok_fast.causal_conv3d(x, w, residual=residual, alpha=0.3, **pads, **how)


def norm(kind):
    def run(x, w, b, scale, residual, **how):
        options = {"kind": kind, "groups": 2, "scale": scale, "residual": residual, "activation": "silu"}
        return vtok_fast.norm_act(x, w, b, **options, **how)

    return run


def attention(q, k, v, **how):
    return vtok_fast.scope_attention(q, k, v, SCOPE, **how)


def fsq(z, **how):
    return vtok_fast.fsq_quantize(z, (8, 5), **how).codes


def pack_and_unpack(x, **how):
    packed = vtok_fast.pack_tokens(x.sin(), KEEP, **how)
    return vtok_fast.unpack_tokens(packed.with_values(packed.values.square()), fill=0.25, **how)


VIDEO = (1, 4, 2, 3, 3)
CASES = {
    "conv": (conv, ((1, 2, 2, 3, 3), (4, 2, 2, 1, 3), (4,), (1, 2, 1, 3, 3))),
    "strided": (strided, ((1, 4, 2, 4, 4), (2, 2, 1, 3, 3), (1, 2, 2, 2, 2))),
    **{
        kind: (norm(kind), (VIDEO, (4,), (4,), (1, 4, 1, 1, 1), VIDEO))
        for kind in ("layer", "rms", "group", "group_rms")
    },
    "attention": (attention, ((1, 2, 7, 4), (1, 1, 7, 4), (1, 1, 7, 4))),
    "fsq": (fsq, ((1, 2, 3, 2),)),
    "pack and unpack": (pack_and_unpack, ((1, 3, 2, 3, 4),)),
}


def inputs(shapes, dtype=torch.float64):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors]


def second(function, given):
    """The gradient of the gradient's squared norm: a penalty."""
    y = function(*given)
    first = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), given, create_graph=True
    )
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), given, allow_unused=True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "fsq"])
def test_gradgradcheck(name):
    function, shapes = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradgradcheck(function, inputs(shapes), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_penalties_on_kernels_are_those_of_the_definition(name):
    """float32, where kernels compute the result: a gradient that will be differentiated leaves them out."""
    function, shapes = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as the one about a missing autograd kernel
        fast = second(function, inputs(shapes, torch.float32))
    exact = second(lambda *t: function(*t, backend="reference"), inputs(shapes))
    for got, want in zip((*fast[0], *fast[1]), (*exact[0], *exact[1])):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_torch_func(name):
    function, shapes = CASES[name]
    given = [t.detach() for t in inputs(shapes)]
    places = tuple(range(len(given)))
    loss = lambda *t: (function(*t).sin()).sum()  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in given]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(grad(loss, places)(*given), want):
        torch.testing.assert_close(a, b)
    batches = [torch.stack((t, t.flip(-1), 2 * t)) for t in given]
    per_sample = vmap(grad(loss, places))(*batches)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in batches]
        for a, b in zip(per_sample, torch.autograd.grad(loss(*leaves), leaves)):
            torch.testing.assert_close(a[i], b)
    value, along = jvp(loss, tuple(given), tuple(torch.ones_like(t) for t in given))
    torch.testing.assert_close(along, sum(g.sum() for g in want))
    torch.testing.assert_close(value, loss(*given))
    jacobian = jacrev(lambda t: function(t, *given[1:]).flatten()[:3])(given[0])
    assert jacobian.shape == (3, *given[0].shape)
    with pytest.raises(vtok_fast.BackendError, match="torch.func differentiates it"):
        grad(lambda *t: function(*t, backend="cpu").sum())(*given)


def test_straight_through_has_the_codes_and_the_gradient():
    z = torch.randn(2, 3, 4, 5)
    codes, indices = fsq_reference.fsq_straight_through(z, (8, 5, 4))
    want = vtok_fast.fsq_quantize(z, (8, 5, 4))
    assert torch.equal(codes, want.codes) and torch.equal(indices, want.indices)
    upstream = torch.randn_like(z)
    (got,) = torch.func.vjp(lambda t: fsq_reference.fsq_straight_through(t, (8, 5, 4))[0], z)[1](upstream)
    torch.testing.assert_close(got, fsq_reference.fsq_quantize_backward(upstream, z, (8, 5, 4)))


def test_per_sample_gradients_of_an_accelerated_model():
    layer = nn.Conv3d(3, 4, 3, padding=1)
    model, x = nn.Sequential(layer, nn.SiLU()).eval(), torch.randn(5, 1, 3, 4, 8, 8)
    loss = lambda p, t: functional_call(model, p, (t,)).square().sum()  # noqa: E731
    parameters = dict(model.named_parameters())
    want = vmap(grad(loss), (None, 0))(parameters, x)
    vtok_fast.accelerate(model)
    got = vmap(grad(loss), (None, 0))(parameters, x)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(vmap(model)(x)).all()


def a_decoder(kind):
    torch.manual_seed(0)
    if kind == "VidTok":
        return vtok_fast.models.VidTok("tiny").eval().decoder, torch.randn(2, 1, 6, 2, 4, 4)
    return vtok_fast.models.Cosmos("tiny").eval().decoder, torch.randn(2, 1, 32, 2, 4, 4)


TRANSFORMS = {
    "grad": lambda f, z: grad(f)(z[0]),
    "vmap": lambda f, z: vmap(f)(z),
    "vmap of grad": lambda f, z: vmap(grad(f))(z),
    "grad of grad": lambda f, z: grad(lambda t: grad(f)(t).square().sum())(z[0]),
    "jvp of grad": lambda f, z: jvp(grad(f), (z[0],), (torch.ones_like(z[0]),))[1],
    "a penalty": lambda f, z: penalty(f, z[0]),
}


def penalty(f, z):
    z = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(z), z, create_graph=True)
    return torch.autograd.grad(first.square().sum(), z)[0]


@pytest.mark.parametrize("what", TRANSFORMS)
@pytest.mark.parametrize("kind", ("VidTok", "Cosmos"))
def test_transforms_of_an_accelerated_decoder(kind, what):
    model, z = a_decoder(kind)
    loss = lambda t: model(t).square().sum()  # noqa: E731
    try:
        want = TRANSFORMS[what](loss, z)
    except RuntimeError as error:  # attention over four axes has no second derivative on a CPU
        assert "flash_attention" in str(error)
        pytest.skip("the model itself has none")
    report = vtok_fast.accelerate(model, check=False)
    got = TRANSFORMS[what](loss, z)
    assert (got - want).norm() <= 1e-3 * want.norm() and not report.bypassed and sum(report.ran().values())


@pytest.mark.parametrize("name", CASES)
def test_empty_batches(name):
    """pytorch/pytorch #12013, #38115: a batch of nothing gives nothing, and weights a gradient of zero."""
    function, shapes = CASES[name]
    if name == "pack and unpack":
        tokens = torch.zeros(0, 3, 2, 3, 4, requires_grad=True)
        keep = torch.zeros(0, 2, 3, 4, dtype=torch.bool)
        packed = vtok_fast.pack_tokens(tokens, keep)
        y = vtok_fast.unpack_tokens(packed)
        y.sum().backward()
        assert y.shape == tokens.shape == tokens.grad.shape
        return
    for backend in ("cpu", "reference", None):
        given = [
            torch.zeros(
                (0, *s[1:]) if len(s) > 3 and (i == 0 or s[0] == 1) and s != (1, 4, 1, 1, 1) else s,
                requires_grad=True,
            )
            for i, s in enumerate(shapes)
        ]
        y = function(*given, backend=backend)
        y.sum().backward()
        assert y.shape[0] == 0
        for t in given:
            assert t.grad is not None and t.grad.shape == t.shape and not t.grad.any()


def test_empty_videos_of_every_op():
    assert vtok_fast.router_scores(torch.zeros(0, 3, 5, 8, 8), torch.zeros(0, 3, 5, 8, 8)).shape == (
        0,
        2,
        1,
        1,
    )
    codes, indices = vtok_fast.fsq_quantize(torch.zeros(0, 2, 4), (3, 3))
    assert vtok_fast.fsq_decode(indices, (3, 3)).shape == codes.shape == (0, 2, 4)
    for strategy in ("elbo", "global_elbo", "bin"):
        assert vtok_fast.token_budget(torch.zeros(0, 8), 0.5, strategy=strategy, elbo_mean=1.0).shape == (0,)
    for method in ("topk", "threshold"):
        assert vtok_fast.select_tokens(torch.zeros(0, 8), 3, method=method).shape == (0, 8)
    assert vtok_fast.select_tokens(torch.zeros(0, 2, 8), 3, method="order").shape == (0, 2, 8)
    assert "causal_conv3d" in backends._ops


# ---- tensors without memory --------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """A tensor around another: it has no address of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda t: t.inner if isinstance(t, cls) else t  # noqa: E731
        y = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: cls(t) if type(t) is torch.Tensor else t, y)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


def memoryless(kind):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return {
        "fake": mode.from_tensor,
        "meta": lambda t: t.to("meta"),
        "wrapped": Wrapped,
        "functional": torch._to_functional_tensor,
        "zero": lambda t: torch._efficientzerotensor(t.shape)[..., 1:],
    }[kind]


@pytest.mark.parametrize("kind", ("fake", "meta", "wrapped"))
@pytest.mark.parametrize("name", [name for name in CASES if name != "pack and unpack"])
def test_ops_on_tensors_without_memory(name, kind, monkeypatch):
    """A kernel would read address 0. Shapes, dtypes and devices are right, and values where there are any;
    of some arguments alone, too."""
    function, shapes = CASES[name]
    given = [t.detach() for t in inputs(shapes, torch.float32)]
    want, own = function(*given), native.arg

    def arg(tensor, on=torch.device("cpu")):
        assert tensor is None or type(tensor) in (torch.Tensor, nn.Parameter) and tensor.data_ptr()
        return own(tensor, on)

    monkeypatch.setattr(native, "arg", arg)
    make = memoryless(kind)
    if kind == "meta" and name == "attention":
        with pytest.raises(NotImplementedError):  # which queries see what is a matter of values
            function(*map(make, given))
        return
    for places in ([*range(len(given))], [0], [len(given) - 1]):
        if kind != "wrapped" and places != [*range(len(given))]:
            continue  # PyTorch's own operations do not mix these either
        y = function(*(make(t) if i in places else t for i, t in enumerate(given)))
        assert y.shape == want.shape and y.dtype == want.dtype
        assert y.device.type == ("meta" if kind == "meta" else "cpu")
        if kind == "wrapped":
            torch.testing.assert_close(y.inner, want)


@pytest.mark.parametrize("kind", ("fake", "wrapped", "functional", "zero"))
def test_no_such_address_reaches_a_kernel(kind):
    for t in (torch.randn(3, 4), torch.randn(2, 3)[:, 1:]):
        with pytest.raises(ValueError, match="which has no memory of its own"):
            native.arg(memoryless(kind)(t))
    assert native.arg(torch.randn(3).as_subclass(Named))[2] == (3,) and native.arg(torch.empty(0))[2] == (0,)


@pytest.mark.parametrize("name", [name for name in CASES if name != "pack and unpack"])
def test_ops_on_zeros_that_are_not_stored(name):
    function, shapes = CASES[name]
    given = [t.detach() for t in inputs(shapes, torch.float32)]
    want = function(torch.zeros_like(given[0]), *given[1:])
    torch.testing.assert_close(function(torch._efficientzerotensor(given[0].shape), *given[1:]), want)


def test_ops_within_a_fake_mode_leave_nothing_behind():
    """Tables are made at their first use, which may be in such a mode."""
    threshold_table.cache_clear()
    scope = vtok_fast.Scope.block_causal(3, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.randn(1, 2, 12, 8)
        assert vtok_fast.scope_attention(q, q, q, scope).shape == q.shape
        assert vtok_fast.fsq_quantize(torch.randn(1, 2, 3), (7, 3)).codes.shape == (1, 2, 3)
        table = threshold_table((7, 3), "vidtok")
    assert type(table) is torch.Tensor and table.data_ptr()
    q, z = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 3)
    torch.testing.assert_close(
        vtok_fast.scope_attention(q, q, q, scope),
        vtok_fast.scope_attention(q, q, q, scope, backend="reference"),
    )
    same = vtok_fast.fsq_quantize(z, (7, 3)), vtok_fast.fsq_quantize(z, (7, 3), backend="reference")
    assert torch.equal(same[0].indices, same[1].indices)
