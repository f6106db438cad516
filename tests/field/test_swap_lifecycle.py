"""What happens to an accelerated model later: wrapped, reverted, copied, pickled, cast, sharded."""

import copy
import functools
import io
import os
import pickle
import weakref

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast.models import VidTok

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support.swap_contract import near, noise, randomize, snapshot  # noqa: E402

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]


def wan():
    torch.manual_seed(0)
    return randomize(diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 4, 3, padding=1)).eval()


def run(model, x):
    with torch.no_grad():
        return model.decode(x).sample if hasattr(model, "decode") else model(x)


KINDS = {"Wan": wan, "convolutions": plain}
INPUT = noise(1, 4, 2, 4, 4)


def wrap_forwards(model):
    """As offloading does it: each forward behind a function that calls it."""
    for m in model.modules():
        if not list(m.children()) or "forward" in m.__dict__:
            own = m.forward
            m.forward = functools.wraps(own)(lambda *a, own=own, **k: own(*a, **k))


@pytest.mark.parametrize("kind", KINDS)
def test_revert_under_wrappers(kind):
    """huggingface/diffusers #11041 and #12096 (wrappers of group offloading): what was wrapped around a swap
    finds the class's own method after revert(), and nothing of the swap runs."""
    model, want = KINDS[kind](), run(KINDS[kind](), INPUT)
    report = vtok_fast.accelerate(model, check=False)
    run(model, INPUT)
    wrap_forwards(model)
    torch.testing.assert_close(run(model, INPUT), want, rtol=1e-3, atol=1e-4)
    report.revert()
    assert not report.active and torch.equal(run(model, INPUT), want)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_revert_under_torch_compile(backend):
    """A compiled model gives its own results again after revert(), and fast ones after the next
    accelerate()."""
    model, want = plain(), run(plain(), INPUT)
    report = vtok_fast.accelerate(model)
    compiled = torch.compile(model, backend=backend)
    fast = run(compiled, INPUT)
    torch.testing.assert_close(fast, want, rtol=1e-4, atol=1e-5)
    report.revert()
    assert torch.equal(run(compiled, INPUT), want)
    again = vtok_fast.accelerate(model)
    assert len(again.swapped) == len(report.swapped)
    torch.testing.assert_close(run(compiled, INPUT), want, rtol=1e-4, atol=1e-5)


def test_revert_while_a_module_is_compiled_in_place():
    model, want = plain(), run(plain(), INPUT)
    report = vtok_fast.accelerate(model)
    model.compile(backend="aot_eager")
    run(model, INPUT)
    report.revert()
    torch.testing.assert_close(run(model, INPUT), want, rtol=0, atol=0)


def test_revert_gives_the_wrapped_model_back_and_a_copy_stays_fast():
    model = wan()
    before = snapshot(model)
    report = vtok_fast.accelerate(model, check=False)
    clone = copy.deepcopy(model)
    fast = run(clone, INPUT)
    report.revert()
    assert snapshot(model).keys() == before.keys() and not any(
        "forward" in m.__dict__ for m in model.modules()
    )
    near(run(clone, INPUT), fast)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ("pickle", "torch.save", "deep copy"))
def test_copies_can_be_accelerated_again(kind, how):
    """A model that was saved while it was accelerated comes back as it was, and can be accelerated again."""
    model, want = KINDS[kind](), run(KINDS[kind](), INPUT)
    report = vtok_fast.accelerate(model, check=False)
    fast = run(model, INPUT)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        report.revert()
        again = copy.deepcopy(model)
    assert torch.equal(run(again, INPUT), want)
    second = vtok_fast.accelerate(again, check=False)
    assert [e.path for e in second.swapped] == [e.path for e in report.swapped]
    torch.testing.assert_close(run(again, INPUT), fast, rtol=1e-4, atol=1e-5)
    second.revert()
    assert torch.equal(run(again, INPUT), want)


def test_a_module_in_two_models():
    """Two models that share their layers: whoever reverts takes out what it put in."""
    shared = plain()
    one, two = nn.Sequential(shared), nn.Sequential(shared)
    first, second = vtok_fast.accelerate(one), vtok_fast.accelerate(two)
    assert first.swapped and not second.swapped and "already accelerated" in str(second.skipped)
    second.revert()
    assert first.active
    first.revert()
    assert not first.active and torch.equal(one(INPUT), plain()(INPUT))


@pytest.mark.parametrize("kind", KINDS)
def test_casts_and_moves(kind):
    """kijai/ComfyUI-FluxTrainer #190, huggingface/accelerate #3617: dtype and device changes of a loaded
    model."""
    model = KINDS[kind]()
    vtok_fast.accelerate(model, check=False)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        reference = KINDS[kind]().to(torch.bfloat16).to(torch.float64).to(torch.float16).to(torch.float32)
        got = run(model, INPUT.to(dtype))
        assert got.dtype == dtype and got.isfinite().all()
    torch.testing.assert_close(got, run(reference, INPUT), rtol=2e-2, atol=2e-2)
    assert run(model.to("meta"), INPUT.to("meta")).is_meta


def test_one_part_cast_by_hand_raises_what_the_model_raises():
    """pkuliyi2015/multidiffusion-upscaler-for-automatic1111 #359: a mixture of dtypes is the model's own
    error."""
    eager, fast = wan(), wan()
    vtok_fast.accelerate(fast, check=False)
    errors = []
    for model in (eager, fast):
        model.decoder.mid_block.resnets[0].conv1.bfloat16()
        with pytest.raises(RuntimeError) as caught:
            run(model, INPUT)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_weights_that_were_moved_away_are_freed():
    """huggingface/accelerate #3617, huggingface/diffusers #7448: offloading has to give the memory back."""
    model = wan()
    vtok_fast.accelerate(model, check=False)
    run(model, INPUT)
    weights = [weakref.ref(p) for p in model.parameters()]
    model.to("meta")
    assert not any(weight() is not None for weight in weights)


def sharded(rank, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
        models = [randomize(VidTok("tiny")) for _ in range(2)]
        for m in models:
            m.load_state_dict(models[0].state_dict())
        report = vtok_fast.accelerate(models[1], check=False)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for m in models:
            for part in (m.encoder, m.decoder, m):
                fully_shard(part, mp_policy=policy)
        with torch.no_grad():
            plain, fast = (m(video) for m in models)
        assert (
            fast.dtype == plain.dtype and (fast.float() - plain.float()).norm() <= 0.05 * plain.float().norm()
        )
        assert report.ran()
        for m in models:
            m.decoder(m.encoder(video).tanh()).float().square().mean().backward()
        grads = [
            torch.cat([p.grad.full_tensor().flatten() for p in m.parameters() if p.grad is not None])
            for m in models
        ]
        assert grads[0].shape == grads[1].shape and (grads[1] - grads[0]).norm() <= 0.1 * grads[0].norm()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp_with_mixed_precision_on_parts(tmp_path):
    """pytorch/pytorch #102981's kind for shards: the dtype that is read off a parameter is not the dtype that
    the model computes in."""
    pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard of this torch (2.6) has no CPUs")
    torch.multiprocessing.spawn(sharded, (os.fspath(tmp_path),), nprocs=2)


def test_calls_that_a_swap_was_not_made_for_are_counted():
    """A swap on paper only: a layer that is always called in another way is not claimed as swapped."""

    class Causal(nn.Conv3d):
        def forward(self, x, scale=1.0):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1, 2, 0))) * scale

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Causal(3, 4, 3), nn.Conv3d(4, 4, 1)

        def forward(self, x):
            return self.b(self.a(x, scale=2.0))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 3, 8, 8)
    want = model(x)
    report = vtok_fast.accelerate(model)
    assert "a" in [e.path for e in report.swapped]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert report.ran() == {"a": 0, "b": 1}
    assert report.bypassed["a"].count == 1 and "scale" in report.bypassed["a"].why
    report.revert()
    report = vtok_fast.accelerate(model, example=x)
    assert [e.path for e in report.swapped] == ["b"]
    assert any(e.path == "a" and "scale" in e.why for e in report.skipped)
    assert report.ran() == {"b": 0} and not report.bypassed
