"""fsq on a GPU: the bits of the CPU's reference, in every layout; on a stream of its own; in a CUDA graph.

tests/emulator/test_fsq.py proves the same kernels without a GPU.
"""

import math

import pytest
import torch

from vtok_fast.dispatch import backends, native
from vtok_fast.dispatch.available import available_backends
from vtok_fast.ops.fsq import fsq_decode, fsq_quantize
from vtok_fast.reference import fsq as reference

WHY = native.why_no_cuda()
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(WHY is not None, reason=str(WHY))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVEL_SETS = ([8] * 4, [8] * 5, [8, 8, 8, 5, 5, 5], [4, 3, 2], [64, 26], [300], [2] * 31)


def same(a, b):
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )


def test_refusals_name_their_reason():
    z = torch.randn(1, 5, 2)
    with pytest.raises(backends.BackendError, match="the tensors are on cpu"):
        fsq_quantize(z, [8] * 5, backend="sm80")
    reasons = available_backends()
    for op in ("fsq", "fsq_decode", "fsq_backward"):
        assert reasons[op]["sm80"] == WHY and reasons[op]["reference"] is None


@gpu
@needs_gpu
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(dtype, levels):
    z = torch.randn(2, len(levels), 3, 40, 56).mul(1.5).to(dtype)
    z.view(-1)[5], z.view(-1)[9], z.view(-1)[11] = math.nan, math.inf, -math.inf
    last = z.contiguous(memory_format=torch.channels_last_3d)
    for value, dim in (
        (z, 1),
        (last, 1),
        (z.movedim(1, -1).contiguous(), 4),
        (last[:, :, :, 1:], 1),
        (z[..., ::2], 1),
        (z[..., 1:], 1),
        (z.transpose(2, 4), 1),
        (z[:1, :, 0, 0, 0], 1),
        (z[:0], 1),
    ):
        on_gpu = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="cuda").copy_(value)
        codes, indices = fsq_quantize(on_gpu, levels, dim=dim, backend="sm80")
        want_codes, want_indices = reference.fsq_quantize(value, levels, dim=dim)
        assert torch.equal(indices.cpu(), want_indices) and same(codes.cpu(), want_codes)
        decoded = fsq_decode(indices, levels, dtype=dtype, dim=dim).cpu()
        assert same(decoded, reference.fsq_decode(want_indices, levels, dtype=dtype, dim=dim))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_to_every_threshold(dtype):
    infinity = torch.tensor(math.inf, dtype=dtype)
    for levels in (*([n] for n in range(2, 65)), [8, 5, 64], [8] * 6):
        t = torch.cat([reference.thresholds(n) for n in sorted(set(levels))]).to(dtype)
        near = torch.cat([t, torch.nextafter(t, infinity), torch.nextafter(t, -infinity)])
        z = torch.stack([near.roll(3 * c) for c in range(len(levels))], 1)
        codes, indices = fsq_quantize(z.cuda(), levels, backend="sm80")
        want_codes, want_indices = reference.fsq_quantize(z, levels)
        assert torch.equal(indices.cpu(), want_indices) and torch.equal(codes.cpu(), want_codes)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype):
    levels = [8, 5, 2]
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        z = (
            torch.randn(2, 3, 3, 17, 24, device="cuda")
            .to(dtype)
            .contiguous(memory_format=layout)
            .requires_grad_()
        )
        upstream = torch.randn_like(z)
        (got,) = torch.autograd.grad(fsq_quantize(z, levels).codes, z, upstream)
        want = reference.fsq_quantize_backward(upstream.double(), z.detach().double(), levels)
        # As in the emulator's test: some float32 roundings of sizes near 1, and one of the result.
        eps, of = torch.finfo(torch.float32).eps, torch.finfo(dtype)
        bound = upstream.double().abs() * 16 * eps + want.abs() * of.eps + of.smallest_normal * of.eps
        assert torch.all((got.double() - want).abs() <= bound)


@gpu
@needs_gpu
def test_streams_and_graphs():
    z = torch.zeros(1, 5, 4, 64, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        z.normal_()
        # Runs after normal_ only if it is on the same stream
        codes, indices = fsq_quantize(z, [8] * 5, backend="sm80")
    stream.synchronize()
    assert torch.equal(indices, fsq_quantize(z, [8] * 5, backend="reference").indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, indices = fsq_quantize(z, [8] * 5, backend="sm80")
    z.normal_()
    graph.replay()
    torch.cuda.synchronize()
    want = fsq_quantize(z, [8] * 5, backend="reference")
    assert torch.equal(indices, want.indices) and torch.equal(codes, want.codes)


@gpu
@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", (torch.contiguous_format, torch.channels_last_3d), ids=("planar", "channels last")
)
def test_more_than_2_to_the_31_elements(layout):
    frames = 2**31 // (8 * 1024 * 1024) + 2
    if torch.cuda.mem_get_info()[0] < 3 * 2 * 8 * frames * 1024 * 1024:
        pytest.skip("not enough memory on the GPU")
    z = torch.empty(
        1, 8, frames, 1024, 1024, dtype=torch.bfloat16, device="cuda", memory_format=layout
    ).normal_()
    codes, indices = fsq_quantize(z, [8] * 8, backend="sm80")
    for frame in (0, frames // 2, frames - 1):
        want_codes, want_indices = reference.fsq_quantize(z[:, :, frame], [8] * 8)
        assert torch.equal(indices[:, frame], want_indices) and torch.equal(codes[:, :, frame], want_codes)
