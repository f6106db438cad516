"""What is compiled of the Triton kernels, for whom, and how often: without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from support.triton_every import attention, every  # noqa: E402
from support.triton_harness import AMD, assert_fits, compile_for  # noqa: E402
from support.triton_launches import recorded  # noqa: E402
from support.triton_signatures import AFTER, compiled  # noqa: E402

from vtok_fast.dispatch import backends, tuning  # noqa: E402
from vtok_fast.kernels import norm_act, norm_act_backward, scope_attention, token_packing  # noqa: E402
from vtok_fast.ops.norm_act import triton as norm_launcher  # noqa: E402
from vtok_fast.ops.norm_act.call import NormCall  # noqa: E402
from vtok_fast.ops.scope_attention import schedule  # noqa: E402
from vtok_fast.ops.scope_attention import triton as launcher  # noqa: E402
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall  # noqa: E402
from vtok_fast.ops.scope_attention.scope import Scope  # noqa: E402

# ---- what fits AMD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [AMD[0], *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in AMD[1:])])
@pytest.mark.parametrize("name", every("hip", (16, 32, 64, 128, 512)))
def test_every_kernel_fits_amd(name, gpu):
    """Compiled, not run: LDS for two blocks of a compute unit, and no register spills."""
    assert_fits(every("hip", (16, 32, 64, 128, 512))[name].on(gpu, compile_for), gpu)


# ---- for whom ----------------------------------------------------------------------------------------------


class On:
    """A tensor that says where it is."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.fixture
def gpu(monkeypatch):
    """Sets what the GPU is."""

    def set_to(capability, hip=None):
        backends.gpu_of.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield set_to
    backends.gpu_of.cache_clear()


def test_gpus_before_ampere_are_refused_by_name(gpu):
    for capability in ((7, 5), (7, 0), (6, 1)):
        gpu(capability)
        why = backends.why_not_triton_on(On("cuda:0"))
        assert why == (
            f"cuda:0 has compute capability {capability[0]}.{capability[1]}, and these kernels are made for "
            "8.0 or later"
        )
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        gpu(capability)
        assert backends.why_not_triton_on(On("cuda:0")) is None
    assert backends.why_not_triton_on(On("meta")) == "the tensors are on meta"


def test_amd_is_a_family_of_its_own(gpu):
    """torch numbers MI300 9.4, RDNA 11.0 and 12.0, as if they were Hopper and Blackwell."""
    for capability in ((9, 4), (9, 5), (11, 0), (12, 0)):
        gpu(capability, hip="6.4")
        assert backends.gpu_of(torch.device("cuda", 0)) == "hip"
        assert backends.why_not_triton_on(On("cuda:0")) is None


def test_families_differ_where_the_hardware_does():
    def tile(gpu):
        return [
            scope_attention.config(kernel, dim, 2, gpu)
            for kernel in scope_attention.KERNELS
            for dim in (16, 32, 64, 128, 512)
        ]

    assert tile(86) == tile(89) == tile(120) == tile(121)
    assert tile(100) == tile(103)
    families = [tile(gpu) for gpu in (80, 90, 100, 120, "hip")]
    assert all(a != b for a, b in itertools.combinations(families, 2))


class OutOfResources(Exception):
    """As Triton names what it raises before a launch."""


def test_a_tile_that_does_not_fit_ends_at_the_reference_with_a_warning(monkeypatch):
    def refuses(call, *args):
        raise OutOfResources("shared memory, Required: 81920, Hardware limit: 65536")

    monkeypatch.setattr(backends, "_ops", {})
    backends.register(
        "twice",
        backends.Backend("triton", lambda call: None, refuses),
        backends.Backend("reference", lambda call: None, lambda call: 2 * call),
    )
    with pytest.warns(RuntimeWarning, match="twice: this GPU has not what a kernel takes .*81920"):
        assert backends.select("twice", 21).run(21) == 42
    assert "81920" in backends.fallbacks()["twice"]["triton"]
    with pytest.raises(OutOfResources):  # who insists is told
        backends.select("twice", 21, "triton").run(21)
    monkeypatch.setattr(tuning, "_watch", lambda *args: None)
    with pytest.raises(OutOfResources):  # and so is who measures
        backends.select("twice", 21).run(21)


# ---- how often ---------------------------------------------------------------------------------------------

LATENTS = (
    (60, 104),
    (30, 52),
    (90, 160),
    (45, 80),
    (135, 240),
    (67, 120),
    (60, 106),
    (33, 45),
)  # 480p to 1080p
SIZES = [s for h, w in LATENTS for s in ((h, w), (w, h))]
SHAPES = [(t, *s) for t in (1, 2, 3, 4, 5, 8, 9, 13, 17) for s in SIZES]
FORMATS = {"planar": torch.contiguous_format, "channels last": torch.channels_last_3d}


def video(channels, shape, layout, batch=1):
    return torch.empty(batch, channels, *shape, dtype=torch.bfloat16, device="meta").to(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind, groups", (("layer", 1), ("rms", 1), ("group", 32)))
def test_norms_compile_at_most_three_times_whatever_the_shape(kind, groups, layout, monkeypatch):
    assert len(SHAPES) == 144
    keys = recorded(monkeypatch, norm_act, norm_act_backward)
    monkeypatch.setattr(norm_act_backward, "statistics", norm_act.statistics)
    weight = torch.empty(128, dtype=torch.bfloat16, device="meta")
    for shape in SHAPES:
        x = video(128, shape, FORMATS[layout])
        norm_act.norm_act(
            x, weight, weight, None, None, None, torch.empty_like(x), kind=kind, groups=groups,
            per_frame=False, eps=1e-6, silu=True, rounding="once", tail=torch.empty_like(x[:, :, -1:]),
        )  # fmt: skip
        norm_act_backward.norm_act_backward(
            x, x, weight, weight, None, None, None, kind=kind, groups=groups, per_frame=False, eps=1e-6,
            activation="silu", rounding="once", layout=FORMATS[layout],
        )  # fmt: skip
    counts = {name: len(found) for name, found in keys.items() if found}
    assert len(counts) == (2 if kind != "group" else 5) and max(counts.values()) <= 3, counts


@pytest.mark.parametrize("layout", FORMATS)
def test_packing_compiles_at_most_three_times_whatever_the_shape(layout, monkeypatch):
    keys = recorded(monkeypatch, token_packing)
    flag = torch.empty(1, dtype=torch.int32, device="meta")
    for i, (t, h, w) in enumerate(SHAPES):
        n = t * h * w
        tokens = video(16, (t, h, w), FORMATS[layout], batch=2).flatten(2)
        keep = torch.empty(2, n, dtype=torch.uint8, device="meta")
        scores = torch.empty(2, n, device="meta")
        token_packing.pack_tokens(tokens, keep, n // 3 + i, flag)
        token_packing.select_tokens(scores, torch.empty(2, dtype=torch.int64, device="meta"), False, flag)
        values = torch.empty(n // 3 + i, 16, dtype=torch.bfloat16, device="meta")
        token_packing.unpack_tokens(values, keep, 0, torch.empty_like(tokens), flag)
        rate = torch.empty(2, dtype=torch.float64, device="meta")
        token_packing.token_budget(scores, rate, "global_elbo", rate[:1], False)
        pixels = video(3, (1 + 4 * (t // 4), 8 * h, 8 * w), FORMATS[layout])
        token_packing.router_scores(pixels, pixels, (4, 8, 8))
    counts = {name: len(found) for name, found in keys.items() if found}
    assert len(counts) == 7 and max(counts.values()) <= 3, counts


@pytest.mark.parametrize("dim", (64, 512))
def test_attention_compiles_at_most_three_times_whatever_the_shape(dim, monkeypatch):
    keys = recorded(monkeypatch, scope_attention)
    for t, h, w in SHAPES:
        scope = Scope.block_causal(t, h * w)
        q = torch.empty(1, 1, t * h * w, dim, dtype=torch.bfloat16, device="meta")
        out, lse = launcher.run(ScopeCall(q, q, q, scope, 0.1), 90)
        launcher.run_backward(ScopeBackwardCall(q, q, q, q, out, lse, scope, 0.1), 90)
    counts = {name: len(found) for name, found in keys.items() if found}
    assert len(counts) >= 4 and max(counts.values()) <= 3, counts


# ---- what is in it -----------------------------------------------------------------------------------------


def test_a_float32_chain_is_not_contracted():
    """A library that computes product and sum one after the other rounds between them."""
    once = {"CENTER": False, "SILU": False, "CHAIN": norm_act.CHAINS["wan"], "planar": False}
    types = dict.fromkeys(AFTER, triton.language.float32)
    chain = {**once, **types}
    with_fusion = compiled(norm_act.position_kernel, 90, "fp32", 128, **chain)
    without = compiled(
        norm_act.position_kernel, 90, "fp32", 128, options={"enable_fp_fusion": False}, **chain
    )
    assert without.instructions("FMUL") > with_fusion.instructions("FMUL")
    assert not without.has(r"fma\.rn\.f32") and without.has(r"mul\.(rn\.)?f32")


@pytest.mark.parametrize("weight", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("x", (torch.float32, torch.bfloat16))
def test_the_launcher_asks_for_that(x, weight, monkeypatch):
    keys = recorded(monkeypatch, norm_act)
    tensors = (
        torch.empty(1, 16, 2, 8, 8, dtype=x, device="meta"),
        torch.empty(16, dtype=weight, device="meta"),
    )
    for rounding in norm_act.CHAINS:
        keys["position_kernel"].clear()
        norm_act.norm_act(
            *tensors, None, None, None, None, torch.empty_like(tensors[0]), kind="rms", groups=1,
            per_frame=False, eps=1e-6, silu=False, rounding=rounding,
        )  # fmt: skip
        ((_, options),) = keys["position_kernel"]
        # LTX rounds to the type of a narrow weight before it multiplies.
        of = {"once": (), "wan": (x, weight), "ltx": (weight,)}[rounding]
        apart = torch.float32 in of
        assert dict(options)["enable_fp_fusion"] != apart


@pytest.mark.parametrize(
    "channels, shape, groups, per_frame",
    ((256, (5, 128, 128), 1, True), (512, (3, 64, 64), 1, True), (128, (17, 64, 64), 32, False)),
)
def test_statistics_are_two_steps_not_a_serial_tail(channels, shape, groups, per_frame, monkeypatch):
    """One for the mean and one for the deviation, where 48 to 64 followed one another."""
    recorded(monkeypatch, norm_act)
    launched = []

    class Statistics:
        def __getitem__(self, grid):
            return lambda *args: launched.append(args)

    monkeypatch.setattr(norm_act, "statistics_kernel", Statistics())
    x = norm_act.view(video(channels, shape, torch.channels_last_3d))
    norm_act.statistics(x, norm_act.View(None), (1, channels, *shape), True, groups, per_frame, 1e-6, True)
    ((*_, parts, _, _, columns, groups, _, center, _, block_parts, block_c, width),) = launched
    assert width > 1 and columns * width == channels and block_parts * block_c <= norm_act.STATISTICS
    assert 2 * triton.cdiv(parts, block_parts) * triton.cdiv(columns // groups, block_c) == 2


def test_bases_that_are_not_aligned_are_copied():
    x = torch.randn(1, 2, 9, 72, dtype=torch.bfloat16)
    for offset in (4, 1):
        narrow = x[..., offset : 64 + offset]
        copy = scope_attention.aligned(narrow)
        assert (
            copy.data_ptr() % 16 == 0 and copy.data_ptr() != narrow.data_ptr() and torch.equal(copy, narrow)
        )
    flat = torch.randn(1 * 2 * 9 * 64 + 4)  # a parameter in a flat buffer: contiguous, and not aligned
    for offset, taken in ((1, False), (4, True)):
        one = flat[offset : offset + 1152].view(1, 2, 9, 64)
        assert (scope_attention.aligned(one) is one) == taken
    aligned = x[..., 8:]
    assert scope_attention.aligned(aligned) is aligned


def test_rows_too_far_apart_for_int32_are_copied():
    storage = torch.empty(1, device="meta", dtype=torch.bfloat16)
    for stride, taken in ((2**24 - 8, True), (2**24, False)):
        far = storage.as_strided((1, 1, 5, 64), (0, 0, stride, 1))
        assert (scope_attention.aligned(far) is far) == taken
        assert (127 * stride < 2**31) or not taken
    alone = storage.as_strided((1, 1, 1, 64), (0, 0, 2**30, 1))
    assert scope_attention.aligned(alone) is alone


def test_more_positions_than_int32_counts_are_refused(gpu):
    gpu((9, 0))
    for side, taken in ((2**15, True), (2**16, False)):
        shape = type("Like", (), {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)})()
        shape.shape = torch.Size((1, 8, 1, side, 2**15 if not taken else 2**14))
        call = NormCall(shape, None, None, None, None, None, "rms", 1, False, 1e-6, None, "once")
        why = norm_launcher.why_not(call)
        assert (why is None) == taken and (taken or "positions in a clip" in why)


def test_strides_beyond_int32_are_counted_whole():
    """Batches of more than 2**31 elements: a stride in units fits int32 where the elements do not."""
    x = torch.empty(2, 128, 17, 1080, 1920, dtype=torch.bfloat16, device="meta")
    assert x.stride(0) > 2**31
    bits, strides, _, _ = norm_act.how(True, 1, norm_act.view(x))
    assert bits & 15 == 2 | 3 << 2 and strides[0] * 8 == x.stride(0)
    for cc in (80, 90):
        planar = compiled(norm_act.sums_kernel, cc, "bf16", 16, planar=True, CENTER=True)
        assert re.search(r"mul\.wide|mad\.lo\.s64|mul\.lo\.s64", planar.ptx)


@pytest.mark.parametrize("unit, widest", ((8, 128), (4, 64)))
def test_planar_videos_whose_planes_are_multiples_of_eight_keep_wide_loads(unit, widest):
    """Latents of 30x52 are 1560 = 8 x 195 pixels; before units, only multiples of 16 were known."""
    once = {"CENTER": True, "SILU": True, "CHAIN": 0, **AFTER}
    for kernel, width, constants in (
        (norm_act.position_kernel, 64, once),
        (norm_act.group_kernel, 16, {"SILU": True}),
        (norm_act.sums_kernel, 16, {"CENTER": True}),
        (norm_act_backward.group_backward_kernel, 16, {"CENTER": True, "SILU": True}),
    ):
        found = compiled(kernel, 90, "bf16", width, planar=True, unit=unit, present=(), **constants)
        wide = found.instructions(rf"(LDG\.E|LDGSTS\.E(\.BYPASS)?(\.LTC128B)?)\.{widest}")
        assert wide and not found.instructions(r"LDG\.E\.U16"), kernel.__name__


@pytest.mark.parametrize(
    "kernel, width, constants, most, registers",
    (
        # SiLU in two approximate instructions: 912 and 1056 without
        (norm_act.position_kernel, 128, {"CENTER": True, "SILU": True, "CHAIN": 0, **AFTER}, 680, 64),
        (norm_act.group_kernel, 128, {"SILU": True}, 820, 64),
    ),
)
def test_budgets_of_instructions(kernel, width, constants, most, registers):
    found = compiled(kernel, 90, "bf16", width, **constants)
    assert found.instructions() <= most and found.registers <= registers


@pytest.mark.parametrize("planar, most, registers", ((False, 150, 80), (True, 142, 80)))
def test_the_sums_read_ahead(planar, most, registers):
    """Three tiles are under way while one is added up (225 and 159 instructions with loads waited for); at
    most 80 registers, so that three blocks share a multiprocessor."""
    found = compiled(norm_act.sums_kernel, 90, "bf16", 16 if planar else 128, planar=planar, CENTER=True)
    (loop, *_) = found.loops()
    assert len(loop) <= most and found.registers <= registers and any("LDGSTS" in line for line in loop)
    waits = compiled(norm_act.sums_kernel, 90, "bf16", 128, CENTER=True, STAGES=1)
    assert not waits.instructions("LDGSTS")


def test_the_scale_of_attention_is_folded_into_the_exponent():
    """570 instructions in the main loop of the commonest head with a product of its own, now 512. The loop
    over what whole steps leave takes less than `HALF_STEP` says."""
    found = attention("forward", 64, "bf16", 90).on(90, compile_for)
    whole, rest = found.loops()[:2]
    assert len(whole) <= 515 and len(rest) <= schedule.HALF_STEP * len(whole) and found.stack == 0
    apart = attention("forward", 64, "bf16", 90)
    apart.constants["IN_EXPONENT"] = False
    assert len(apart.on(90, compile_for).loops()[0]) >= len(whole) + 48


@pytest.mark.parametrize("dim", (256, 512))
@pytest.mark.parametrize("kernel", scope_attention.KERNELS)
def test_large_heads_on_hopper_compute_no_score_twice(kernel, dim):
    """The products of the tile by those that the mathematics needs: each program that makes a part of the
    head computes all scores again."""
    c = scope_attention.config(kernel, dim, 2, 90)
    scores, results = {"forward": (1, 1), "queries": (2, 1), "keys": (2, 2)}[kernel]
    programs = dim // c.block_d
    assert programs * (scores * dim + results * c.block_d) <= 1.1 * (scores + results) * dim
    found = attention(kernel, dim, "bf16", 90).on(90, compile_for)
    assert_fits(found, 90, spills=16)
    assert found.has("wgmma" if (kernel, dim) != ("keys", 512) else r"mma\.sync")
