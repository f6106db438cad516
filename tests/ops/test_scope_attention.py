"""scope_attention against softmax under a mask in float64, on every backend that runs here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.scope_cases import by_hand, scopes

import vtok_fast
from vtok_fast import parity
from vtok_fast.nn.scope_attention import ScopeAttention, rotary_angles, rotate
from vtok_fast.ops.scope_attention import cpu, scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.reference import scope_attention as reference

BACKENDS = ("cpu", "reference")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SCOPES = {
    "dense": Scope.dense(70, 90),
    "time invariant": Scope.time_invariant(tiv=24, tv=4, patches=32, slices=4),
    "patches only": Scope.time_invariant(tiv=24, tv=4, patches=32, slices=3, patches_see="patches"),
    "block causal": Scope.block_causal(5, 27),
    "per frame": Scope.per_frame(6, 32),
    "packed": Scope.packed([0, 30, 30, 75, 80], q_len=90),
    "many short ranges": Scope.from_segments(
        [(s, s + 60, [(i, i + 3) for i in range(s // 60, 90, 9)]) for s in (0, 60, 120)], 200, 100
    ),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that an element that nobody writes is found."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=(True, False), ids=("small scopes under a mask", "no mask"))
def masks(request, monkeypatch):
    monkeypatch.setattr(cpu, "LARGEST_MASK", cpu.LARGEST_MASK if request.param else -1)
    for scope in SCOPES.values():
        scope.cache.clear()


def inputs(scope, dim=16, batch=2, heads=4, kv_heads=4, dtype=torch.float32, grad=False):
    def make(h, n):
        return (
            torch.randn(batch, n, h, dim, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_(grad)
        )

    return make(heads, scope.q_len), make(kv_heads, scope.k_len), make(kv_heads, scope.k_len)


def exact(q, k, v, scope, scale=None):
    """Softmax under a mask in float64 by PyTorch's own operators, and zero where a query sees nothing."""
    mask = by_hand(scope)
    q, k, v = (t.double() for t in (q, k, v))
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(
        ~(mask | ~mask.any(1, keepdim=True)), -torch.inf
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return (
            F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True) * mask.any(1)[:, None]
        )


@settings(max_examples=60, deadline=None)
@given(scopes(), st.sampled_from((1, 2, 9)), st.sampled_from(BACKENDS), st.booleans(), st.integers(0, 999))
def test_any_scope_and_its_gradients(scope, batch, backend, mask, seed):
    torch.manual_seed(seed)
    before, cpu.LARGEST_MASK = cpu.LARGEST_MASK, cpu.LARGEST_MASK if mask else -1
    try:
        q, k, v = inputs(scope, 8, batch, 4, 2, torch.float64, grad=True)
        y, want = scope_attention(q, k, v, scope, backend=backend), exact(q, k, v, scope)
        grad = torch.randn_like(y)
        torch.testing.assert_close(y, want)
        if scope.q_len and scope.k_len:
            torch.testing.assert_close(
                torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad)
            )
    finally:
        cpu.LARGEST_MASK = before


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("dtype", NARROW)
def test_cpu_is_close(name, dtype, masks):
    scope = SCOPES[name]
    for kv_heads in (4, 2):
        q, k, v = inputs(scope, kv_heads=kv_heads, dtype=dtype, grad=True)
        mask = by_hand(scope)
        theirs = (
            F.scaled_dot_product_attention(q, k, v, mask | ~mask.any(1, keepdim=True), enable_gqa=True)
            * mask.any(1)[:, None]
        )
        y = scope_attention(q, k, v, scope, backend="cpu")
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        want = exact(*wide, scope)
        measured = parity.close(y.detach(), want.detach(), theirs.detach())
        assert measured.ok, str(measured)
        assert torch.equal(y[:, :, ~mask.any(1)], torch.zeros_like(y[:, :, ~mask.any(1)]))
        grad = torch.randn_like(y)
        for ours, exactly, other in zip(
            *(
                torch.autograd.grad(r, i, grad.to(r.dtype))
                for r, i in ((y, (q, k, v)), (want, wide), (theirs, (q, k, v)))
            )
        ):
            measured = parity.close(ours, exactly, other)
            assert measured.ok, str(measured)


@pytest.mark.parametrize("dtype", NARROW)
def test_fewer_heads_of_keys_on_a_torch_that_has_no_such_kernel(dtype, masks, monkeypatch):
    monkeypatch.setattr(cpu, "_shares_heads", lambda: False)
    test_cpu_is_close("time invariant", dtype, masks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("time invariant", "many short ranges", "packed"))
def test_large_scores_merge_without_overflow(backend, name):
    scope = SCOPES[name]
    q, k, v = inputs(scope)
    q = q * 300  # scores in the thousands: a softmax that is nearly an argmax
    measured = parity.close(
        scope_attention(q, k, v, scope, backend=backend),
        exact(q, k, v, scope),
        reference.scope_attention(q, k, v, scope.mask(), 0.25)[0],
    )
    assert measured.ok, str(measured)


def test_plan_is_few_dense_calls_on_views():
    def calls(scope):
        return [(len(layer), sum(c.index is not None for c in layer)) for layer in cpu.plan(scope).layers]

    assert calls(Scope.time_invariant(tiv=96, tv=8, patches=1024, slices=4)) == [(2, 0), (1, 0)]
    assert calls(Scope.time_invariant(tiv=96, tv=8, patches=1024, slices=32)) == [(2, 0), (1, 0)]
    assert calls(Scope.per_frame(9, 1024)) == [(1, 0)]
    assert calls(Scope.block_causal(9, 1024)) == [(9, 0)]
    assert calls(SCOPES["many short ranges"])[0][1] > 0
    scope = Scope.per_frame(3, 4)
    x = torch.randn(1, 2, 12, 8)
    [((window,), _)] = cpu._views(cpu.plan(scope).layers[0][0], (x,), (x,))
    assert (
        window.shape == (3, 2, 4, 8) and window.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    )
    assert cpu.plan(scope) is cpu.plan(scope)


def test_one_head_is_shared_among_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "BLOCK", 8)
    monkeypatch.setattr(cpu, "LARGEST_MASK", 0)
    scope = Scope.block_causal(3, 56)  # seven blocks of 8: four for one thread and three for the other
    calls = []
    shared = cpu._shared
    monkeypatch.setattr(
        cpu, "_shared", lambda c, units, backward=False: calls.append(shared(c, units, backward)) or calls[-1]
    )
    q, k, v = inputs(scope, batch=1, heads=1, kv_heads=1, grad=True)
    out = scope_attention(q, k, v, scope, backend="cpu")
    out.sum().backward()
    assert [(c.rows, c.count) for c in calls] == [(28, 2)] * 6
    assert parity.close(out, exact(q, k, v, scope), out).ok
    wanted = torch.autograd.grad(exact(q, k, v, scope).sum(), (q, k, v))
    for mine, want in zip((q, k, v), wanted):
        assert (mine.grad - want).norm() <= 4 * parity.floor(torch.float32) * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("packed", "time invariant"))
def test_gradcheck(backend, name, masks):
    scope = (
        Scope.packed([0, 3, 3, 7], q_len=9)
        if name == "packed"
        else Scope.time_invariant(tiv=2, tv=1, patches=2, slices=2)
    )
    q, k, v = inputs(scope, 4, 2, 2, 1, torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: scope_attention(*x, scope, scale=0.7, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_the_layout_of_the_result(backend, masks):
    scope = SCOPES["block causal"]
    n, d = scope.q_len, 16
    for qkv in (
        torch.randn(2, n, 3, 4, d).permute(2, 0, 3, 1, 4),
        torch.randn(3, 2, 4, d, n).mT,
        torch.randn(3, 2, 4, n, d),
        torch.randn(3, 1, 4, n, d).expand(3, 2, 4, n, d),
        torch.randn(3, 2, 4, n, 2 * d)[..., ::2],
    ):
        q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(0))
        y = scope_attention(q, k, v, scope, backend=backend)
        torch.testing.assert_close(y, exact(q, k, v, scope).float())
        assert y.stride() == torch.empty_like(q).stride()
        upstream = torch.randn(2, 4, d, n).mT
        got = torch.autograd.grad(y, (q, k, v), upstream)
        for a, b in zip(got, torch.autograd.grad(exact(q, k, v, scope), (q, k, v), upstream.double())):
            torch.testing.assert_close(a, b.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, masks):
    scope = SCOPES["time invariant"]
    for dtype, kv_heads in ((torch.float32, 4), (torch.bfloat16, 2)):
        q, k, v = inputs(scope, kv_heads=kv_heads, dtype=dtype, grad=True)
        torch.library.opcheck(torch.ops.vtok_fast.scope_attention, (q, k, v, *scope.csr, 0.25, backend))
        q, k, v = (t.detach() for t in (q, k, v))
        out, lse = torch.ops.vtok_fast.scope_attention(q, k, v, *scope.csr, 0.25, backend)
        torch.library.opcheck(
            torch.ops.vtok_fast.scope_attention_backward,
            (torch.randn_like(out), q, k, v, out, lse, *scope.csr, 0.25, backend),
        )


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compile_fullgraph_keeps_the_plan(compiler, monkeypatch):
    plans = []
    monkeypatch.setattr(cpu, "_plan", lambda scope, make=cpu._plan: plans.append(scope) or make(scope))
    compiled = torch.compile(
        lambda q, k, v, scope: scope_attention(2 * q, k, v, scope).square(), fullgraph=True, backend=compiler
    )
    scope = Scope.time_invariant(tiv=8, tv=2, patches=16, slices=3)
    q, k, v = inputs(scope, grad=True)
    y = compiled(q, k, v, scope)
    want = scope_attention(2 * q, k, v, scope).square()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))
    )
    # Once for both ways and both directions: the compiled graph's tensors lead back to the scope
    assert plans == [scope]
    for other in (Scope.block_causal(2, 31), Scope.time_invariant(tiv=8, tv=2, patches=16, slices=3)):
        torch.testing.assert_close(compiled(q, k, v, other), scope_attention(2 * q, k, v, other).square())


def test_automatic_choice_and_functional_transforms():
    scope = SCOPES["per frame"]
    q, k, v = inputs(scope)
    assert torch.equal(scope_attention(q, k, v, scope), scope_attention(q, k, v, scope, backend="cpu"))
    with vtok_fast.backend("reference"):
        assert torch.equal(
            scope_attention(q, k, v, scope), scope_attention(q, k, v, scope, backend="reference")
        )
    with pytest.raises(vtok_fast.BackendError, match="sm90"):
        scope_attention(q, k, v, scope, backend="sm90")


def test_gradients_do_not_depend_on_chance():
    scope = SCOPES["time invariant"]
    q, k, v = inputs(scope, grad=True)
    grad = torch.randn_like(q)
    first, second = (torch.autograd.grad(scope_attention(q, k, v, scope), (q, k, v), grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(2, 3, 4)}, ValueError, r"q: expected \(B, heads, S, D\), got shape \(2, 3, 4\)"),
        ({"q": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, TypeError, "q: .*int64"),
        (
            {"k": torch.ones(2, 4, 6, 8).half()},
            TypeError,
            "k: expected the dtype of q, torch.float32, got torch.float16",
        ),
        ({"k": torch.ones(3, 4, 6, 8)}, ValueError, r"k: .*2 and 8, got shape \(3, 4, 6, 8\)"),
        ({"k": torch.ones(2, 4, 6, 9)}, ValueError, r"k: .*\(2, 4, 6, 9\)"),
        ({"k": torch.ones(2, 3, 6, 8)}, ValueError, "k: .*divides the 4 of q, got 3"),
        ({"v": torch.ones(2, 4, 5, 8)}, ValueError, r"v: .*\(2, 4, 6, 8\), got \(2, 4, 5, 8\)"),
        (
            {"q": torch.ones(2, 4, 6, 8, device="meta")},
            ValueError,
            "k: expected the device of q, meta, got cpu",
        ),
        ({"scope": torch.ones(6, 6)}, TypeError, "scope: .*Tensor"),
        ({"scope": Scope.dense(5, 6)}, ValueError, "scope: expected 6 queries and 6 keys.*5 queries"),
        ({"scope": Scope.dense(6).to("meta")}, ValueError, "scope: .*cpu, got meta"),
        ({"scale": float("nan")}, ValueError, "scale: .*nan"),
        (
            {"q": torch.ones(2, 4, 6, 0), "k": torch.ones(2, 4, 6, 0)},
            ValueError,
            r"q: expected at least one.*\(2, 4, 6, 0\)",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {
        "q": torch.ones(2, 4, 6, 8),
        "k": torch.ones(2, 4, 6, 8),
        "v": torch.ones(2, 4, 6, 8),
        "scope": Scope.dense(6),
    }
    with pytest.raises(error, match=message):
        scope_attention(**{**good, **change})


# ---- the module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
def test_module_is_multihead_attention_under_a_mask(backend, bias):
    scope = SCOPES["time invariant"]
    theirs = torch.nn.MultiheadAttention(48, 6, bias=bias, batch_first=True, dtype=torch.float64)
    ours = ScopeAttention(48, 6, bias, backend=backend, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, scope.q_len, 48, dtype=torch.float64, requires_grad=True)
    y, want = ours(x, scope=scope)[0], theirs(x, x, x, attn_mask=~scope.mask(), need_weights=False)[0]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(ours(x)[0], theirs(x, x, x, need_weights=False)[0])
    grads = [
        torch.autograd.grad(r.square().sum(), (x, *m.parameters())) for r, m in ((y, ours), (want, theirs))
    ]
    torch.testing.assert_close(*grads)
    memory = torch.randn(2, 90, 48, dtype=torch.float64)
    across = Scope.packed([0, 60, scope.q_len], [0, 50, 90])
    torch.testing.assert_close(
        ours(x, memory, memory + 1, across)[0],
        theirs(x, memory, memory + 1, attn_mask=~across.mask(), need_weights=False)[0],
    )


def test_module_projects_twice_with_rotary_positions_between():
    """InfoTok: q and k are projected and turned, and then go through an nn.MultiheadAttention that projects
    them again."""
    frames, h, w, dim, heads = 3, 4, 5, 32, 4
    scope, module = (
        Scope.block_causal(frames, h * w),
        ScopeAttention(dim, heads, twice=True, dtype=torch.float64),
    )
    torch.nn.init.normal_(module.in_proj_bias)
    x = torch.randn(2, frames * h * w, dim, dtype=torch.float64)
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    row, column = torch.arange(h).repeat_interleave(w).double(), torch.arange(w).repeat(h).double()
    turn = torch.cat((row[:, None] * frequencies[0::2], column[:, None] * frequencies[1::2]), 1).repeat(
        frames, 1
    )
    as_complex = lambda t: torch.view_as_complex(t.reshape(2, -1, heads, 4, 2))  # noqa: E731
    q, k = (
        torch.view_as_real(as_complex(t) * torch.polar(torch.ones_like(turn), turn)[:, None]).flatten(2)
        for t in (q, k)
    )
    plain = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    want = plain(q, k, v, attn_mask=~scope.mask(), need_weights=False)[0]
    torch.testing.assert_close(module(x, scope=scope, angles=rotary_angles((h, w), 8))[0], want)


def test_module_is_the_official_infotok_attention():
    golden = load_file(Path(__file__).resolve().parents[1] / "golden_data" / "infotok_vit.safetensors")
    module, prefix = (
        ScopeAttention(32, 4, twice=True, dtype=torch.float64),
        "weights/vit_encoder.0.attention.mha.",
    )
    module.load_state_dict(
        {name.removeprefix(prefix): t.double() for name, t in golden.items() if name.startswith(prefix)}
    )
    y = module(
        golden["in/block/x"].double(), scope=Scope.block_causal(2, 12), angles=rotary_angles((3, 4), 8)
    )[0].detach()
    want = golden["out/block/attention"].double()  # its rotary positions were float32
    assert (y - want).norm() <= parity.floor(torch.float32) * want.norm()


def test_rotary_positions_are_relative_on_every_axis():
    angles = rotary_angles((3, 4, 5), 20)
    assert angles.shape == (60, 10) and angles.dtype == torch.float64
    q, k = torch.randn(2, 1, 20, dtype=torch.float64).expand(2, 60, 20)
    scores = (rotate(q, angles) @ rotate(k, angles).mT).view(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1, :-1, :-1])
    for axis in range(3):  # and each axis matters
        assert not torch.allclose(scores[0, 0, 0].movedim(axis, 0)[0], scores[0, 0, 0].movedim(axis, 0)[1])
    assert torch.equal(rotate(q, torch.zeros(60, 10)), q)
    assert rotate(q.bfloat16(), angles).dtype == torch.bfloat16


def test_module_compiles_whole():
    module, scope = ScopeAttention(32, 4, twice=True), SCOPES["per frame"]
    x, angles = torch.randn(2, scope.q_len, 32), rotary_angles((4, 8), 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, scope=scope, angles=angles)[0], module(x, scope=scope, angles=angles)[0]
    )


def test_bad_arguments_of_the_module_are_named():
    with pytest.raises(ValueError, match="num_heads: .*32 channels, got 5"):
        ScopeAttention(32, 5)
    module, x = ScopeAttention(32, 4), torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match=r"key: expected \(B, S, 32\), got shape \(2, 6, 31\)"):
        module(x, x[..., 1:])
    with pytest.raises(ValueError, match="need_weights"):
        module(x, need_weights=True)
    with pytest.raises(
        ValueError, match=r"angles: expected \(n, 4\) with n a divisor of the 6 tokens, got \(4, 4\)"
    ):
        module(x, angles=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="head_dim: .*3 axes.*got 4"):
        rotary_angles((2, 2, 2), 4)
