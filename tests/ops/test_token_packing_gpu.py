"""token_packing on a GPU: the bits of the reference, no wait for the device, CUDA graphs, and errors that
come late."""

import pytest
import torch

from vtok_fast.ops.token_packing import pack_tokens, router_scores, select_tokens, token_budget, unpack_tokens
from vtok_fast.ops.token_packing.packed_tokens import PackedTokens, raise_device_errors

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def no_waiting():
    """Once its kernels are compiled, a call that waits for the device fails."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def videos(dtype, layout):
    a, b = torch.randn(2, 2, 3, 9, 64, 96)
    return [v.to(dtype).contiguous(memory_format=layout).cuda() for v in (a, a + 0.1 * b)]


def chain(video, other, z):
    scores = router_scores(video, other)
    budget = token_budget(scores, 0.5, strategy="bin", elbo_mean=0.08)
    keep = select_tokens(scores, budget, method="threshold")
    packed = pack_tokens(z, keep, capacity=keep.numel())
    return scores, budget, keep, packed, unpack_tokens(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last_3d))
def test_the_bits_of_the_reference(dtype, layout):
    a, b = videos(dtype, layout)
    scores = router_scores(a, b, backend="triton")
    assert torch.equal(scores.cpu(), router_scores(a.cpu(), b.cpu(), backend="reference"))
    for options in (
        {},
        {"strategy": "global_elbo", "elbo_mean": 0.09},
        {"strategy": "bin", "elbo_mean": 0.07},
    ):
        for rate in (0.37, torch.tensor([0.3, 0.9])):
            assert torch.equal(
                token_budget(scores, rate, **options).cpu(), token_budget(scores.cpu(), rate, **options)
            )
    for method in ("topk", "threshold"):
        keep = select_tokens(scores, [100, 17], method=method, backend="triton")
        assert torch.equal(
            keep.cpu(), select_tokens(scores.cpu(), [100, 17], method=method, backend="reference")
        )
    for channels in (1, 6, 256, 300):
        z = torch.randn(2, channels, 3, 8, 12).to(dtype).contiguous(memory_format=layout).cuda()
        for capacity in (None, 200):
            packed = pack_tokens(z, keep, capacity=capacity, backend="triton")
            want = pack_tokens(z.cpu(), keep.cpu(), capacity=capacity, backend="reference")
            for name in ("values", "indices", "cu_seqlens"):
                assert torch.equal(getattr(packed, name).cpu(), getattr(want, name))
            dense = unpack_tokens(packed, fill=3.0, backend="triton").cpu()
            assert torch.equal(dense, unpack_tokens(want, fill=3.0, backend="reference"))
    z = torch.randn(2, 3, 3, 8, 12).to(dtype).cuda()
    got, want = (
        pack_tokens(v, k, levels=[8, 5, 4], backend=name)
        for v, k, name in ((z, keep, "triton"), (z.cpu(), keep.cpu(), "reference"))
    )
    assert torch.equal(got.values.cpu(), want.values)
    assert torch.equal(PackedTokens.from_bytes(got.to_bytes(160)).values, want.values)


def test_34020_tokens_with_ties():
    scores = (torch.randn(8, 21, 30, 54) * 50).round() / 50
    budget = torch.tensor([0, 1, 5000, 17010, 30000, 34019, 34020, 7])
    for method in ("topk", "threshold"):
        got = select_tokens(scores.cuda(), budget.cuda(), method=method, backend="triton")
        assert torch.equal(got.cpu(), select_tokens(scores, budget, method=method, backend="reference"))


def test_gradients():
    keep, z = torch.rand(2, 3, 8, 12).cuda() < 0.5, torch.randn(2, 16, 3, 8, 12).cuda().requires_grad_()
    packed = pack_tokens(z, keep, capacity=700)
    upstream = torch.randn_like(packed.values)
    (grad,) = torch.autograd.grad(packed.values, z, upstream)
    assert (
        torch.equal(grad.movedim(1, -1)[keep], upstream[: int(keep.sum())])
        and not grad.movedim(1, -1)[~keep].any()
    )
    values = packed.values.detach().requires_grad_()
    dense = unpack_tokens(packed.with_values(values))
    (grad,) = torch.autograd.grad(dense, values, z.detach())
    assert torch.equal(grad[: int(keep.sum())], z.movedim(1, -1)[keep]) and not grad[int(keep.sum()) :].any()


def test_nothing_waits(no_waiting):
    inputs = *videos(torch.bfloat16, torch.channels_last_3d), torch.randn(2, 16, 3, 8, 12).cuda()
    chain(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    chain(*inputs)
    select_tokens(torch.rand(2, 8, device="cuda"), 3)
    with pytest.raises(RuntimeError, match="synchroniz"):  # the exact size is read back
        pack_tokens(inputs[2], torch.ones(2, 3, 8, 12, dtype=torch.bool, device="cuda"))


def test_cuda_graph():
    inputs = *videos(torch.float32, torch.contiguous_format), torch.randn(2, 16, 3, 8, 12).cuda()
    chain(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(*inputs)
    for fresh, old in zip(
        (*videos(torch.float32, torch.contiguous_format), torch.randn_like(inputs[2])), inputs
    ):
        old.copy_(fresh)
    graph.replay()
    want = chain(*inputs)
    for got, expected in zip(
        (*result[:3], result[3].values, result[4]), (*want[:3], want[3].values, want[4])
    ):
        assert torch.equal(got, expected)


def test_what_a_device_finds_is_raised_late_and_once():
    device = torch.device("cuda", torch.cuda.current_device())
    raise_device_errors(device)
    scores = torch.rand(2, 50, device=device)
    keep = select_tokens(scores, torch.tensor([-4, 99], device=device))
    assert keep.sum(1).tolist() == [0, 50]
    pack_tokens(torch.randn(2, 3, 50, device=device), keep, capacity=10)
    with pytest.raises(ValueError, match="budget: .*; capacity: "):
        pack_tokens(torch.randn(2, 3, 50, device=device), keep)
    assert len(pack_tokens(torch.randn(2, 3, 50, device=device), keep).values) == 50
    with pytest.raises(ValueError, match="budget: .*got -4"):
        select_tokens(scores, torch.tensor([-4, 9], device=device), validate=True)


def test_more_than_2_to_31_elements():
    keep = torch.zeros(1, 17, 1024, 512, dtype=torch.bool, device="cuda")
    keep[0, -1, -1, -5:] = keep[0, 0, 0, 0] = True
    z = torch.zeros(1, 17, 1024, 512, 256, dtype=torch.uint8, device="cuda").movedim(-1, 1)
    z[0, :, -1, -1, -5:] = 7
    packed = pack_tokens(z, keep, backend="triton")
    assert packed.indices.tolist() == [0, *range(17 * 1024 * 512 - 5, 17 * 1024 * 512)]
    assert packed.values[1:].eq(7).all() and not packed.values[0].any()
    dense = unpack_tokens(packed, backend="triton")
    assert dense[0, :, -1, -1, -5:].eq(7).all() and int(dense.sum(dtype=torch.int64)) == 7 * 5 * 256
