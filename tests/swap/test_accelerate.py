"""accelerate(): what it swaps, what it refuses, and that it gives everything back."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import VidTok
from vtok_fast.models.vidtok import blocks
from vtok_fast.swap.adapters import vidtok as adapter

pytestmark = pytest.mark.needs_native


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VidTok("tiny").eval()


@pytest.fixture
def video():
    torch.manual_seed(1)
    return torch.rand(1, 3, 5, 32, 32) * 2 - 1


def snapshot(model):
    """Everything that revert() must restore: the very objects, their classes and their instance
    attributes."""
    return {name: (id(m), type(m), dict(m.__dict__)) for name, m in model.named_modules()}


def same(before, after):
    return before.keys() == after.keys() and all(
        b[:2] == a[:2] and b[2].keys() == a[2].keys() and all(b[2][k] is a[2][k] for k in b[2])
        for b, a in zip(before.values(), after.values())
    )


@torch.no_grad()
def test_outputs_stay_close_and_every_module_is_accounted_for(model, video):
    z, z64 = model.encoder(video), copy.deepcopy(model).double().encoder(video.double())
    codes = model.regularization(z).codes
    decoded, decoded64 = model.decoder(codes), copy.deepcopy(model).double().decoder(codes.double())
    report = vtok_fast.accelerate(model)
    fast = model.encoder(video)
    assert (p := parity.close(fast, z64, z)).ok, p
    assert (p := parity.close(model.decoder(codes), decoded64, decoded)).ok, p
    assert parity.tokens(fast, z, z64, model.config.levels).ok
    named = {e.path for e in report.swapped} | {e.path for e in report.skipped}
    for path, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, (nn.Identity, nn.Dropout)):
            assert any(path == n or path.startswith(n + ".") or n == "" for n in named), path
    assert all(e.error <= e.bound for e in report.swapped if e.error is not None)


def test_nothing_but_the_method_changes_and_revert_restores_it(model, video):
    before, keys, expected = snapshot(model), list(model.state_dict()), model(video)
    report = vtok_fast.accelerate(model, check=False)
    assert list(model.state_dict()) == keys
    assert {n: s[:2] for n, s in snapshot(model).items()} == {n: s[:2] for n, s in before.items()}
    assert report.active and not same(before, snapshot(model))
    report.revert()
    assert same(before, snapshot(model)) and not report.active
    assert torch.equal(model(video), expected)
    report.revert()
    assert same(before, snapshot(model))


def test_nested_blocks_and_exceptions_give_the_model_back(model):
    before = snapshot(model)
    with pytest.raises(KeyError):
        with vtok_fast.accelerated(model, check=False) as outer:
            inside = snapshot(model)
            with vtok_fast.accelerated(model, check=False) as inner:
                assert not inner.swapped and outer.swapped
                assert any("already accelerated" in e.why for e in inner.skipped)
            assert same(inside, snapshot(model))
            raise KeyError
    assert same(before, snapshot(model))


def test_an_exception_while_checking_leaves_the_model_as_it_was(model):
    before = snapshot(model)
    with pytest.raises(ValueError, match="video"):
        vtok_fast.accelerate(model, example=torch.zeros(1, 3, 5, 33, 32))
    assert same(before, snapshot(model))


def test_example_checks_each_swap_on_its_own_inputs(model, video):
    before = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    report = vtok_fast.accelerate(model, example=video)
    assert report.end_to_end is not None and report.end_to_end.error < 1
    assert all(e.error is not None for e in report.swapped if e.what != "levels without relayouts")
    assert before == {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}


def test_a_swap_that_fails_its_contract_is_undone(model, monkeypatch):
    def wrong(block, x):
        return adapter.resblock2d_forward(block, x) * 1.001

    swap = dataclasses.replace(adapter._SWAPS[blocks.ResBlock2d], function=wrong)
    monkeypatch.setitem(adapter._SWAPS, blocks.ResBlock2d, swap)
    report = vtok_fast.accelerate(model)
    failed = [e for e in report.skipped if e.why.startswith("failed its contract")]
    assert failed and all(e.kind == "ResBlock2d" and e.error > e.bound for e in failed)
    assert not any("forward" in m.__dict__ for m in model.modules() if isinstance(m, blocks.ResBlock2d))
    assert any(e.kind == "ResBlock3d" for e in report.swapped)


def test_one_wrong_border_pixel_does_not_hide():
    ref = torch.randn(1, 16, 8, 64, 64, dtype=torch.float64)
    y = ref.float()
    assert parity.close(y, ref).ok
    y[0, 3, 2, 0, 17] += 1e-3
    assert not parity.close(y, ref).ok


def test_blocks_with_hooks_or_replaced_parts_are_left_alone(model):
    block = next(m for m in model.modules() if isinstance(m, blocks.ResBlock2d))
    seen = []
    block.norm1.register_forward_hook(lambda *a: seen.append(1))
    report = vtok_fast.accelerate(model, check=False)
    assert "forward" not in block.__dict__
    assert any("has hooks" in e.why for e in report.skipped)
    block(torch.randn(1, block.conv1.in_channels, 8, 8))
    assert seen


def test_unknown_modules_are_named():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 8, 3, padding=1)
    )
    report = vtok_fast.accelerate(net)
    assert {e.path: e.why for e in report.skipped} == {
        "0": "no adapter knows this kind of module",
        "1": "padding_mode 'circular' has no kernel",
    }
    assert [e.path for e in report.swapped] == ["2"]
    x = torch.randn(2, 4, 9, 11)
    torch.testing.assert_close(net[2](x), nn.Conv2d.forward(net[2], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(6, 8, 3, padding=(1, 0, 1)),
        nn.Conv3d(6, 8, 3, stride=2, padding=1, padding_mode="replicate"),
        nn.Conv3d(6, 8, (1, 3, 5), padding="same", padding_mode="reflect", bias=False),
        nn.Conv3d(6, 6, 3, groups=3, dilation=(1, 2, 1)),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, 4, stride=2, padding="valid"),
        nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"),
    ],
    ids=str,
)
def test_torch_convolutions(module):
    report = vtok_fast.accelerate(module)
    assert len(report.swapped) == 1 and not report.skipped
    x = torch.randn(2, 6, *(8,) * len(module.kernel_size))
    fast, single = module(x), module(x[0])
    report.revert()
    with torch.no_grad():
        eager, ref64 = module(x), copy.deepcopy(module).double()(x.double())
    assert parity.close(fast, ref64, eager).ok and fast.shape == eager.shape
    assert single.shape == eager.shape[1:]


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        vtok_fast.accelerate(lambda x: x)
    with pytest.raises(ValueError, match="contract: expected one of exact, close, fast, got 'loose'"):
        vtok_fast.accelerate(nn.Identity(), contract="loose")


def test_gradients_flow_and_are_close(model, video):
    def gradients(model, video):
        for p in model.parameters():
            p.grad = None
        model.decoder(model.encoder(video).tanh()).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(2)
    for p in model.parameters():  # temporal blocks start as the identity, which would hide errors
        p.data.add_(torch.randn_like(p) * 0.02)
    eager, ref64 = gradients(model, video), gradients(copy.deepcopy(model).double(), video.double())
    vtok_fast.accelerate(model, check=False)
    fast = gradients(model, video)
    assert fast.keys() == eager.keys()
    for name in eager:
        bound = max(2 * ((eager[name] - ref64[name]).norm() / ref64[name].norm()).item(), 1e-5)
        assert ((fast[name] - ref64[name]).norm() / ref64[name].norm()).item() <= 2 * bound, name


def test_compiles_without_graph_breaks(model, video):
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        expected = model.decoder(model.regularization(model.encoder(video)).codes)
        compiled = torch.compile(
            lambda v: model.decoder(model.regularization(model.encoder(v)).codes),
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(compiled(video), expected)


def test_copies_and_pickles(model, video):
    vtok_fast.accelerate(model, check=False)
    expected = model.encoder(video)
    clone = copy.deepcopy(model)
    for m in clone.modules():
        if "forward" in m.__dict__:
            assert m.__dict__["forward"].__self__ is m
    assert torch.equal(clone.encoder(video), expected)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again.encoder(video), expected, rtol=1e-3, atol=1e-4)


def test_weights_written_behind_our_back_are_seen(model, video):
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        model.encoder(video)
        for p in model.encoder.parameters():
            p.data.mul_(0.9)  # no version counter is bumped
        fast = model.encoder(video)
        expected = copy.deepcopy(model).double()
        for m in expected.modules():
            for attribute in ("forward", "run_level", "run_out"):
                m.__dict__.pop(attribute, None)
        assert parity.relative_errors(fast, expected.encoder(video.double()))["whole"] < 1e-5


@pytest.mark.volatile
def test_threads_share_one_model(model, video):
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        expected = model.encoder(video)
        results = [None] * 4

        def work(i):
            with torch.no_grad():
                results[i] = model.encoder(video)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(torch.equal(r, expected) for r in results)


def test_report_is_readable(model, tmp_path):
    report = vtok_fast.accelerate(model)
    text = str(report)
    assert "Swapped" in text and f"{len(report.swapped)} modules swapped" in text
    assert "encoder.conv_in" in report.details()
    import json

    data = json.loads(report.to_json())
    assert data["active"] and {"path", "kind", "what", "why", "error"} <= data["swapped"][0].keys()
    measured = [e for e in report.swapped if e.fast_bytes is not None]
    # A block made of a padded copy, a norm, an activation and a sum takes less memory when it is one or two
    # kernels.
    assert measured and all(e.eager_bytes > 0 for e in measured)
    assert sum(e.fast_bytes for e in measured) < 0.8 * sum(e.eager_bytes for e in measured)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 1


def test_batches_with_several_clips(model):
    torch.manual_seed(3)
    video = torch.rand(3, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        eager, ref64 = model.encoder(video), copy.deepcopy(model).double().encoder(video.double())
        vtok_fast.accelerate(model, check=False)
        assert parity.close(model.encoder(video), ref64, eager).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, video, dtype):
    ref = copy.deepcopy(model).double().encoder(video.double())

    def run():
        with torch.autocast("cpu", dtype):
            z = model.encoder(video)
            z.float().square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
        model.zero_grad()
        return z.detach(), grads

    (eager, eager_grads), _ = run(), vtok_fast.accelerate(model, check=False)
    fast, fast_grads = run()
    assert fast.dtype == dtype
    error = {
        name: parity.relative_errors(z, ref.detach())["whole"]
        for name, z in (("fast", fast), ("eager", eager))
    }
    assert error["fast"] <= 2 * error["eager"]
    assert (fast_grads - eager_grads).norm() <= 0.1 * eager_grads.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, video, dtype):
    ref = copy.deepcopy(model).double().encoder(video.double())
    model.to(dtype)
    with torch.no_grad():
        eager = model.encoder(video.to(dtype))
        report = vtok_fast.accelerate(model)
        fast = model.encoder(video.to(dtype))
    assert not [e for e in report.skipped if e.why.startswith("failed")]
    assert parity.relative_errors(fast, ref)["whole"] <= 2 * parity.relative_errors(eager, ref)["whole"]


def test_tokens_are_compared_on_an_example(model, video):
    report = vtok_fast.accelerate(model, example=video)
    (tokens,) = report.tokens
    assert tokens.ok and tokens.total == 2 * 8 * 8 and "tokens equal" in str(report)


def test_random_numbers_of_the_program_are_left_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    vtok_fast.accelerate(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_bad_setting_leaves_the_model_as_it_was(model, monkeypatch):
    before = snapshot(model)
    monkeypatch.setenv("VTOK_FAST_WEIGHT_CACHE", "lots")
    with pytest.raises(ValueError, match="VTOK_FAST_WEIGHT_CACHE: expected a number of bytes, got 'lots'"):
        vtok_fast.accelerate(model, check=False)
    assert same(before, snapshot(model))
