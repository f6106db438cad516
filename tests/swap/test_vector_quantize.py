"""vector-quantize-pytorch: FSQ by thresholds, ResidualFSQ's layers in place, LFQ left alone."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast.swap.adapters.fsq_parity import compare

library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
pytestmark = pytest.mark.needs_native


def near_a_threshold(levels):
    """Per channel, float32 values around every threshold: where eager and exact tokens can differ."""
    from vtok_fast.reference.fsq import thresholds

    columns = []
    for level in levels:
        t = thresholds(level)
        steps = torch.stack([t * (1 + k * torch.finfo(torch.float32).eps) for k in range(-8, 9)]).flatten()
        columns.append(steps[torch.randperm(len(steps), generator=torch.Generator().manual_seed(level))][:24])
    return torch.stack(columns, -1)[None]


FSQS = [
    ({"levels": [8, 5, 5, 5]}, (2, 30, 4)),
    ({"levels": [8, 8, 8, 5, 5, 5]}, (2, 6, 3, 4, 5)),
    ({"levels": [5, 3]}, (2, 2, 4, 5)),
    ({"levels": [8, 5], "dim": 7}, (2, 30, 7)),
    ({"levels": [8, 5], "num_codebooks": 3}, (2, 6, 4, 5)),
    ({"levels": [8, 5], "num_codebooks": 2, "dim": 5, "projection_has_bias": False}, (2, 5, 3, 4, 5)),
    ({"levels": [8, 5], "keep_num_codebooks_dim": True}, (2, 30, 2)),
    ({"levels": [8, 5], "return_indices": False}, (2, 30, 2)),
    ({"levels": [8, 5], "channel_first": True}, (2, 2, 30)),
    ({"levels": [7, 26, 100]}, (2, 30, 3)),
]
SYMMETRIC = [
    ({"levels": [8, 5, 2], "preserve_symmetry": True}, (2, 30, 3)),
    ({"levels": [8, 5, 5], "preserve_symmetry": True, "bound_hard_clamp": True}, (2, 3, 4, 5, 6)),
    ({"levels": [8, 5], "preserve_symmetry": True, "num_codebooks": 2, "dim": 5}, (2, 30, 5)),
    ({"levels": [8, 5], "preserve_symmetry": True, "return_indices": False}, (2, 30, 2)),
]


@pytest.mark.parametrize("options,shape", FSQS, ids=str)
def test_fsq(options, shape):
    torch.manual_seed(0)
    fsq = library.FSQ(**options).eval()
    z = torch.randn(shape, requires_grad=True)
    out, indices = fsq(z)
    out.square().sum().backward()
    gradient, z.grad = z.grad, None
    report = vtok_fast.accelerate(fsq)
    assert [e.path for e in report.swapped if e.kind == "FSQ"] == [""], report
    ours, tokens = fsq(z)
    ours.square().sum().backward()
    torch.testing.assert_close(ours, out, rtol=1e-6, atol=1e-6)  # a flipped token would be a whole level away
    torch.testing.assert_close(z.grad, gradient, rtol=1e-4, atol=1e-5)
    assert (tokens is None) == (indices is None)
    if tokens is not None:
        assert torch.equal(tokens, indices) and tokens.dtype == indices.dtype
        torch.testing.assert_close(fsq.indices_to_codes(tokens), out.detach(), rtol=1e-5, atol=1e-5)
    report.revert()
    assert "forward" not in fsq.__dict__


@pytest.mark.parametrize("options,shape", SYMMETRIC, ids=str)
@pytest.mark.parametrize("contract", ["exact", "close"])
def test_symmetric_fsq_is_bit_equal(options, shape, contract):
    torch.manual_seed(0)
    fsq = library.FSQ(**options).eval()
    z = torch.randn(shape) * 2
    kept = z.clone()
    with torch.no_grad():
        out, indices = fsq(z)
        report = vtok_fast.accelerate(fsq, contract=contract)
        assert [e.path for e in report.swapped if e.kind == "FSQ"] == [""], report
        ours, tokens = fsq(z)
    assert torch.equal(ours, out) and torch.equal(z, kept)
    assert tokens is indices is None or torch.equal(tokens, indices)
    z.requires_grad_()
    fsq(z)[0].sum().backward()  # by the library's own code
    assert z.grad is not None and z.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"force_quantization_f32": False},
        {"allowed_dtypes": (torch.float32, torch.bfloat16)},
        {"preserve_symmetry": True},
    ],
    ids=str,
)
def test_dtypes(dtype, options):
    torch.manual_seed(0)
    fsq, z = library.FSQ([8, 5, 5], **options), torch.randn(2, 50, 3).to(dtype)
    with torch.no_grad():
        out, indices = fsq(z)
        vtok_fast.accelerate(fsq)
        ours, tokens = fsq(z)
    assert ours.dtype == out.dtype and torch.equal(ours, out) and torch.equal(tokens, indices)


def test_exact_leaves_the_rounding_of_tanh_alone():
    report = vtok_fast.accelerate(library.FSQ([8, 5, 5]), contract="exact")
    assert not report.swapped and "replaces arithmetic" in report.skipped[0].why


def test_tokens_that_differ_are_counted_with_their_distance_to_the_threshold():
    levels = [8, 8, 5, 7]
    z = near_a_threshold(levels)
    fsq = library.FSQ(levels)
    with torch.no_grad():
        _, eager = fsq(z)
        report = vtok_fast.accelerate(fsq, example=z)
        _, ours = fsq(z)
    (entry,) = report.swapped
    differ = int((ours != eager).sum())
    assert differ > 0 and entry.note.startswith(f"{differ} of {eager.numel()} tokens differ")
    assert float(entry.note.split("the furthest ")[1].split(" ulp")[0]) < 20 and entry.error == 0
    assert report.ok  # those tokens may differ, so nothing is taken out for the sake of the whole


def test_a_wrong_token_far_from_a_threshold_fails():
    z = torch.tensor([[[0.3, -0.4]]])
    fsq = library.FSQ([8, 5])
    _, right = fsq(z)
    assert compare(z, [8, 5], -1, right, right).ok
    assert not compare(z, [8, 5], -1, right + 1, right + 1).ok  # ours is wrong
    assert not compare(z, [8, 5], -1, right, right + 1).ok  # eager's cannot be explained by its roundings


@pytest.mark.parametrize(
    "options", [{}, {"dim": 7}, {"is_channel_first": True}, {"bound_hard_clamp": False}], ids=str
)
def test_residual_fsq_is_bit_equal(options):
    torch.manual_seed(0)
    model = library.ResidualFSQ(levels=[8, 5, 5], num_quantizers=3, **options).eval()
    x = torch.randn(2, 3, 20) if "is_channel_first" in options else torch.randn(2, 20, options.get("dim", 3))
    with torch.no_grad():
        expected = model(x, return_all_codes="is_channel_first" not in options)
        report = vtok_fast.accelerate(model, contract="exact")
        assert sum(e.kind == "FSQ" for e in report.swapped) == 3, report
        for y, e in zip(model(x, return_all_codes="is_channel_first" not in options), expected):
            assert torch.equal(y, e)
    clone = copy.deepcopy(model)
    assert all(layer.__dict__["forward"].__self__ is layer for layer in clone.layers)


def test_quantize_dropout_and_noise_in_training_are_the_librarys():
    model = library.ResidualFSQ(levels=[8, 5, 5], num_quantizers=4, quantize_dropout=True).train()
    x = torch.randn(2, 20, 3, requires_grad=True)
    vtok_fast.accelerate(model)
    _, indices = model(x, rand_quantize_dropout_fixed_seed=2)
    model.eval()
    assert (indices == -1).any() and not (model(x)[1] == -1).any()
    noisy = library.FSQ([8, 5, 5], preserve_symmetry=True, noise_dropout=0.5).train()
    vtok_fast.accelerate(noisy)
    with torch.no_grad():
        assert not torch.equal(noisy(x)[0], noisy(x)[0])


@pytest.mark.parametrize(
    "model",
    [
        library.LFQ(codebook_size=16, dim=4),
        library.FSQ([5, 5], orthogonal_rotation=True),
        library.FSQ([8, 5], bound_hard_clamp=True),
        library.FSQ([1200, 5], return_indices=False),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_others_are_named(model):
    report = vtok_fast.accelerate(model)
    assert not report.swapped and report.skipped[0].path == "" and report.skipped[0].why
