"""A thousand random calls of each op against its definition, by its contract. Hypothesis shrinks what fails
to a small case."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtok_fast
from vtok_fast import Scope, parity

pytestmark = pytest.mark.slow
FLOATS = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
thousand = settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@st.composite
def layouts(draw, shape, dtype):
    """Random values of a shape in some memory layout."""
    order = draw(st.permutations(range(len(shape))))
    seed = draw(st.integers(0, 2**31))
    x = torch.randn([shape[i] for i in order], generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):  # not dense: every second column of a wider tensor
        x = torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]
    return x.to(dtype).permute([order.index(i) for i in range(len(shape))])


@st.composite
def convolutions(draw):
    dtype, groups = draw(FLOATS), draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(
        st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 3, 2, 5]), st.sampled_from([1, 3, 3, 4]))
    )
    stride, dilation = (draw(st.tuples(*[st.sampled_from([1, 1, 1, 2])] * 3)) for _ in range(2))
    upsample = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3)]))
    batch, channels, outputs = (
        draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 9)),
        groups * draw(st.integers(1, 9)),
    )
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
    time_mode, spatial_mode = (draw(st.sampled_from(["zeros", "replicate", "reflect"])) for _ in range(2))
    cache = draw(st.one_of(st.none(), st.integers(1, 3)))
    pads = [draw(st.integers(0, 3)) for _ in range(6)]
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "time_pad": pads[:2],
        "spatial_pad": (pads[2:4], pads[4:]),
        "time_mode": time_mode,
        "spatial_mode": spatial_mode,
        "upsample": upsample,
        "upsample_first_frame_once": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "silu"])),
    }
    tensors = {
        "x": draw(layouts((batch, channels, *size), dtype)),
        "weight": draw(layouts((outputs, channels // groups, *kernel), dtype)) / math.prod(kernel),
        "bias": draw(st.one_of(st.none(), layouts((outputs,), dtype))),
        "cache": None if cache is None else draw(layouts((batch, channels, cache, *size[1:]), dtype)),
    }
    return tensors, options


def judge(op, tensors, options, **how):
    """The op on the backend of automatic choice, against float64 and against PyTorch in the same dtype."""
    double = {
        k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in tensors.items()
    }
    measured = parity.close(
        op(**tensors, **options, **how),
        op(**double, **options, backend="reference"),
        op(**tensors, **options, backend="reference"),
    )
    assert measured.ok, str(measured)


@thousand
@given(convolutions(), st.sampled_from(["auto", "direct", "winograd2", "winograd4"]))
def test_causal_conv3d(call, algorithm):
    tensors, options = call
    try:
        vtok_fast.causal_conv3d(**tensors, **options, backend="reference")
    except ValueError:  # too small for its kernel, or reflected beyond its size: refused alike
        with pytest.raises(ValueError):
            vtok_fast.causal_conv3d(**tensors, **options)
        return
    with vtok_fast.algorithm(algorithm):
        judge(vtok_fast.causal_conv3d, tensors, options)


@thousand
@given(st.data())
def test_norm_act(data):
    draw, dtype = data.draw, data.draw(FLOATS)
    kind, groups = (
        draw(st.sampled_from(["layer", "rms", "group", "group_rms"])),
        draw(st.sampled_from([1, 2, 4])),
    )
    shape = (
        draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 9)),
        *draw(st.tuples(*[st.integers(1, 7)] * 3)),
    )
    channel = st.one_of(st.none(), layouts((shape[1],), torch.float32))
    full = st.one_of(st.none(), layouts(shape, dtype))
    tensors = {
        "x": draw(layouts(shape, dtype)),
        "weight": draw(channel),
        "bias": draw(channel),
        "residual": draw(full),
        "scale": draw(st.one_of(full, layouts((shape[0], shape[1], 1, 1, 1), dtype))),
        "shift": draw(full),
    }
    options = {
        "kind": kind,
        "groups": groups,
        "per_frame": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-6, 1e-3])),
        "activation": draw(st.sampled_from([None, "silu"])),
    }
    judge(vtok_fast.norm_act, tensors, options)


@thousand
@given(st.data())
def test_fsq(data):
    draw, dtype = data.draw, data.draw(FLOATS)
    levels = draw(st.lists(st.integers(2, 20), min_size=1, max_size=7))
    rest = draw(st.lists(st.integers(0, 6), max_size=4))
    dim = draw(st.integers(0, len(rest)))
    z = draw(layouts((*rest[:dim], len(levels), *rest[dim:]), dtype)) * draw(
        st.sampled_from([1.0, 0.1, 5.0, 1e30])
    )
    variant = draw(st.sampled_from(["vidtok", "elastictok"]))
    got = vtok_fast.fsq_quantize(z, levels, dim=dim, variant=variant)
    want = vtok_fast.fsq_quantize(z, levels, dim=dim, variant=variant, backend="reference")
    assert parity.exact(got.indices, want.indices).ok and parity.exact(got.codes, want.codes).ok
    if not got.codes.isnan().any():
        assert torch.equal(vtok_fast.fsq_decode(got.indices, levels, dtype=dtype, dim=dim), got.codes)


@st.composite
def scopes(draw, queries, keys):
    """Any segments with any ranges."""
    cuts = sorted(draw(st.lists(st.integers(0, queries), max_size=5)))
    segments = []
    for start, end in zip([0, *cuts], [*cuts, queries], strict=True):
        edges = sorted(draw(st.lists(st.integers(0, keys), max_size=6)))
        segments.append((start, end, list(zip(edges[::2], edges[1::2], strict=False))))
    return Scope.from_segments(segments, queries, keys)


@thousand
@given(st.data())
def test_scope_attention(data):
    draw, dtype = data.draw, data.draw(FLOATS)
    queries, keys, heads, shared = (draw(st.integers(1, n)) for n in (24, 24, 2, 2))
    scope, size, batch = (
        draw(scopes(queries, keys)),
        draw(st.sampled_from([1, 4, 8, 16, 20])),
        draw(st.integers(1, 2)),
    )
    tensors = {
        "q": draw(layouts((batch, heads * shared, queries, size), dtype)),
        "k": draw(layouts((batch, heads, keys, size), dtype)),
        "v": draw(layouts((batch, heads, keys, size), dtype)),
    }
    if dtype == torch.float32:
        return judge(vtok_fast.scope_attention, tensors, {"scope": scope})
    # Of a handful of numbers the contract's ratio would be a matter of luck, so here is the bound of each.
    # What is rounded to the dtype, by half an eps each: the probabilities, the result of each of up to three
    # ranges, and what two of them are merged to.
    q, k, v = (t.double() for t in tensors.values())
    error = (
        vtok_fast.scope_attention(**tensors, scope=scope) - vtok_fast.scope_attention(q, k, v, scope)
    ).abs()
    weighed = vtok_fast.scope_attention(q, k, v.abs(), scope)
    assert (error <= (1 + 1 + 2) * torch.finfo(dtype).eps / 2 * weighed + 1e-7).all(), (error / weighed).max()


@thousand
@given(st.data())
def test_token_packing(data):
    draw, dtype = (
        data.draw,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
    )
    batch, channels, grid = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.tuples(*[st.integers(1, 5)] * 3)),
    )
    cell = draw(st.tuples(*[st.integers(1, 3)] * 3))
    shape = (batch, 3, 1 + (grid[0] - 1) * cell[0], grid[1] * cell[1], grid[2] * cell[2])
    videos = draw(layouts(shape, dtype)), draw(layouts(shape, dtype))
    scores = vtok_fast.router_scores(*videos, cell)
    assert parity.exact(scores, vtok_fast.router_scores(*videos, cell, backend="reference")).ok
    budget = vtok_fast.token_budget(scores, draw(st.floats(0, 1)))
    method = draw(st.sampled_from(["topk", "threshold", "order"]))
    if method == "order":  # the first so many of every frame
        budget = budget.clamp(max=grid[1] * grid[2])
    keep = vtok_fast.select_tokens(scores, budget, method=method)
    assert parity.exact(keep, vtok_fast.select_tokens(scores, budget, method=method, backend="reference")).ok
    tokens = draw(layouts((batch, channels, *grid), dtype))
    packed, other = (vtok_fast.pack_tokens(tokens, keep, backend=b) for b in (None, "reference"))
    for name in ("values", "indices", "cu_seqlens"):
        assert parity.exact(getattr(packed, name), getattr(other, name)).ok, name
    dense = vtok_fast.unpack_tokens(packed, fill=0.5)
    assert parity.exact(dense, torch.where(keep.unsqueeze(1), tokens, torch.tensor(0.5, dtype=dtype))).ok
