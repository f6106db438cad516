"""Further public reports of the kinds that the other files of this folder test: each names its own."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import vtok_fast
from vtok_fast.models import VidTok

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]


def convolutions(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(16, 32, 3, padding=1), nn.SiLU(), nn.Conv3d(32, 16, 3, padding=1)).eval()


X = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """A model, accelerated and already called, and the same one as it is."""
    model = convolutions()
    plain = copy.deepcopy(model)
    report = vtok_fast.accelerate(model)
    with torch.no_grad():
        model(X)
    assert len(report.swapped) == 2
    return model, plain


def same(model, plain, x=X):
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("assign", (False, True))
def test_weights_that_are_loaded_later(pair, assign):
    """pytorch/pytorch #129362: after load_state_dict(assign=True) a compiled model went on with the old
    weights."""
    model, plain = pair
    other = convolutions(7).state_dict()
    for m in (model, plain):
        m.load_state_dict({k: v.clone() for k, v in other.items()}, assign=assign)
    same(model, plain)


@pytest.mark.parametrize("how", ("storage", "in place", "no version"))
def test_averaged_weights_that_take_turns_with_trained_ones(pair, how):
    """open-mmlab/mmengine #266: averages of the weights are swapped in for validation, and out again, in ways
    that no counter of changes sees."""
    model, plain = pair
    averages = [p.detach() * 0.5 + 0.01 for p in model.parameters()]
    for _ in range(2):
        for m in (model, plain):
            for i, (p, average) in enumerate(zip(m.parameters(), list(averages))):
                before = p.detach().clone()
                if how == "storage":
                    p.data = average.clone()
                elif how == "in place":
                    with torch.no_grad():
                        p.copy_(average)
                else:
                    p.data.copy_(average)
                if m is plain:
                    averages[i] = before
        same(model, plain)


def test_an_adapter_that_is_merged_and_unmerged(pair):
    """huggingface/peft #637: merging adds to ``weight.data``, unmerging subtracts."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, plain = pair
    for m in (model, plain):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        m.tuner = [peft.get_peft_model(m, config)]
    a, b = model.tuner.pop(), plain.tuner.pop()
    for step in ("attached", "merged", "unmerged"):
        if step != "attached":
            for m in (a, b):
                m.merge_adapter() if step == "merged" else m.unmerge_adapter()
        same(a, b)
    same(a.merge_and_unload(), b.merge_and_unload())


class ByView(torch.autograd.Function):
    """Somebody's function whose backward pass needs contiguous gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.view(grad.shape[0], -1).view(grad.shape)


def test_gradients_that_foreign_code_views(pair):
    """huggingface/diffusers #1969: view(...) of a gradient raised in the backward pass of a network."""
    model, plain = pair
    grads = []
    for m in (model, plain):
        x = X.clone().requires_grad_()
        seen = []
        h = ByView.apply(x)
        h.register_hook(lambda g, seen=seen: seen.append(g.stride()))
        h = ByView.apply(m[0](h))
        m[2](nn.functional.silu(h)).square().sum().backward()
        grads.append((x.grad, seen))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-4)
    assert grads[0][1] == grads[1][1]


@pytest.mark.parametrize("channels", (1, 16))
@pytest.mark.parametrize("size", ((1, 1), (1, 8), (8, 1), (8, 8)), ids=str)
def test_strides_of_batches_of_one_and_of_thin_pictures(channels, size):
    """pytorch/pytorch #113437: with axes of one element a layout is ambiguous, and a view of it surprises."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, channels, 1)).eval()
    plain, x = copy.deepcopy(model), torch.randn(1, channels, *size)
    vtok_fast.accelerate(model)
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            got, want = model(given), plain(given)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.is_contiguous() == want.is_contiguous()
            assert got.is_contiguous(memory_format=torch.channels_last) == want.is_contiguous(
                memory_format=torch.channels_last
            )


def test_hooks_on_all_modules_see_what_they_saw():
    """numenta/nupic.torch #51: hooks of layers that a wrapper called by ``forward`` were ignored."""
    torch.manual_seed(0)
    model, x = VidTok("tiny").eval(), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    seen = []
    vtok_fast.accelerate(model, check=False)
    handle = register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        with torch.no_grad():
            model.encoder(x)
            ours, seen[:] = list(seen), []
            with torch.no_grad():
                copy.deepcopy(model).encoder(x)  # swapped too
            copied, seen[:] = list(seen), []
            plain = VidTok("tiny").eval()
            plain.encoder(x)
    finally:
        handle.remove()
    assert ours == seen == copied


class Around:
    """What caches and offloading put around a forward: each keeps what it found."""

    def __init__(self, module, log, name):
        self.module, self.inner = module, module.forward
        module.forward = self
        self.log, self.name = log, name

    def __call__(self, *args, **kwargs):
        self.log.append(self.name)
        return self.inner(*args, **kwargs)

    def remove(self):
        self.module.forward = self.inner


def test_two_wrappers_around_one_forward(pair):
    """vllm-project/vllm-omni #2689: a cache and offloading on one module; only one of them ran."""
    model, plain = pair
    log = []
    cache, offload = Around(model[0], log, "cache"), Around(model[0], log, "offload")
    same(model, plain)
    assert log == ["offload", "cache"]
    offload.remove()
    same(model, plain)
    cache.remove()
    same(model, plain)
    assert log == ["offload", "cache", "cache"]


def test_parameters_of_a_functional_call_are_those_used(pair):
    """pytorch/pytorch #92295: a module's forward did not see the tensors that functional_call was given."""
    model, plain = pair
    results = []
    for m in (model, plain):
        given = {k: (v.detach() * 2).requires_grad_() for k, v in m.named_parameters()}
        y = torch.func.functional_call(m, given, (X,))
        results.append((y, torch.autograd.grad(y.square().mean(), list(given.values()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for got, want in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_quantized_layers_are_left_alone_and_copied():
    """huggingface/optimum-quanto #358, pytorch/pytorch #56108 and #28328: copies of quantized models."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 4)).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    report = vtok_fast.accelerate(model, example=x)
    assert [e.path for e in report.swapped] == ["0"]
    # 8 bits of the activations' range: an input that moves by a rounding may move by one step
    step = model[1](model[0](x)).abs().max() / 127 * model[2].weight().dequantize().abs().max()
    for m in (model, copy.deepcopy(model)):
        assert (m(x) - want).abs().max() <= step
    report.revert()
    assert torch.equal(model(x), want)


class OwnWeightNorm(nn.Module):
    """Somebody's weight norm: before each call it sets a plain tensor, a result of others, as the weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        weight = self.conv.weight.detach().clone()
        del self.conv._parameters["weight"]
        self.v, self.g = nn.Parameter(weight), nn.Parameter(weight.flatten(1).norm(dim=1))
        self.conv.weight = self.made()

    def made(self):
        return self.v * (self.g / self.v.flatten(1).norm(dim=1))[:, None, None, None]

    def forward(self, x):
        self.conv.weight = self.made()
        return self.conv(x)


def test_weights_that_a_program_computes():
    """locuslab/deq #23: such a model cannot be copied ('only tensors created explicitly by the user')."""
    torch.manual_seed(0)
    model, x = nn.Sequential(OwnWeightNorm(), nn.Conv2d(8, 4, 3, padding=1)), torch.randn(2, 4, 8, 8)
    model(x).sum().backward()
    want = model(x)
    report = vtok_fast.accelerate(model)
    assert "1" in [e.path for e in report.swapped]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model[0].g.mul_(3)
    got = model(x)
    report.revert()
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_a_forward_that_threads_take_out_and_put_back(pair):
    """sgl-project/sglang #8521: offloading that sets the original forward for each call, in several
    threads."""
    model, plain = pair
    ours = model[0].forward
    lock, failures = threading.Lock(), []

    def offloaded(x):
        with lock:  # as its review asked for
            model[0].forward = ours
            y = torch.func.functional_call(model[0], dict(model[0].state_dict()), (x,))
            model[0].forward = offloaded
        return y

    def work():
        try:
            for _ in range(5):
                same(model, plain)
        except Exception as error:
            failures.append(error)

    model[0].forward = offloaded
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
