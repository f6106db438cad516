"""What accelerate() must keep of a model, whatever library it is from: used by the tests of each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Vectors moved away from zero and one, so that no bias and no scale is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == max(p.shape, default=1):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Two runs of one accelerated model: which algorithm a convolution takes depends on whose weights the
    cache holds."""
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


def snapshot(model: nn.Module) -> dict:
    """The very objects: modules, classes, instance attributes, parameters."""
    return {
        name: (
            id(m),
            type(m),
            {k: id(v) for k, v in m.__dict__.items() if not isinstance(v, (int, float, tuple, list))},
            {k: id(v) for k, v in m._parameters.items()},
        )
        for name, m in model.named_modules()
    }


class Attached(nn.Module):
    """A wrapper in a layer's place that does more than the layer: what LoRA does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return (y[0] * 1.5, *y[1:]) if isinstance(y, tuple) else y * 1.5


class SwapContract:
    """A test class inherits the tests and says what the model is.

    ``make()`` a small one with random weights; ``x`` a video and ``z`` a latent; ``encode(model, x)`` and
    ``decode(model, z)`` give tensors; ``part`` is the path of a block with a layer ``layer`` in it;
    ``left_alone`` are the classes that no adapter takes.
    """

    left_alone: set[str] = set()
    layer = "conv1"
    exact_swaps = True

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return randomize(self.make())

    @pytest.fixture
    def x(self):
        return noise(*self.video)

    @pytest.fixture
    def z(self):
        return noise(*self.latent, seed=2)

    @torch.no_grad()
    def results(self, model, x, z):
        return self.encode(model, x), self.decode(model, z)

    def check(self, model, x, z, **options):
        """Both directions of an accelerated copy against the model and its double."""
        fast = copy.deepcopy(model)
        report = vtok_fast.accelerate(fast, check=False, **options)
        eager, ref64 = (
            self.results(model, x, z),
            self.results(copy.deepcopy(model).double(), x.double(), z.double()),
        )
        for y, e, r in zip(self.results(fast, x, z), eager, ref64):
            assert (p := parity.close(y, r, e)).ok, p
        return report

    def test_close_in_both_directions(self, model, x, z):
        report = self.check(model, x, z)
        assert report.swapped and {e.kind for e in report.skipped} <= self.left_alone, report

    def test_every_module_meets_its_contract(self, model, x):
        report = vtok_fast.accelerate(model)
        assert all(e.error <= e.bound for e in report.swapped if e.error is not None) and any(
            e.error for e in report.swapped
        )
        assert {e.kind for e in report.skipped} <= self.left_alone, report
        assert not any("failed" in e.why or "raised" in e.why for e in report.skipped), report

    def test_every_module_meets_its_contract_on_an_example(self, model, x):
        report = vtok_fast.accelerate(model, example=self.example(x))
        assert not any("failed" in e.why or "the whole model was" in e.why for e in report.skipped), report
        assert report.end_to_end is not None and (
            report.end_to_end.error <= report.end_to_end.bound or report.tokens
        ), report

    def test_revert_gives_the_very_objects_back(self, model, x, z):
        expected, before, keys = self.results(model, x, z), snapshot(model), list(model.state_dict())
        report = vtok_fast.accelerate(model, check=False)
        assert list(model.state_dict()) == keys and report.active
        self.results(model, x, z)
        report.revert()
        after = snapshot(model)
        was, now = ({n: (s[:2], s[3], s[2].keys()) for n, s in state.items()} for state in (before, after))
        assert was == now
        for y, e in zip(self.results(model, x, z), expected):
            assert torch.equal(y, e)

    def test_the_exact_contract_is_bit_equal(self, model, x, z):
        expected = self.results(model, x, z)
        report = vtok_fast.accelerate(model, contract="exact")
        assert bool(report.swapped) == self.exact_swaps and all(e.contract == "exact" for e in report.swapped)
        assert not any("failed" in e.why for e in report.skipped), report
        for y, e in zip(self.results(model, x, z), expected):
            assert torch.equal(y, e)

    def test_copies_and_pickles(self, model, x, z):
        expected = self.results(model, x, z)
        vtok_fast.accelerate(model, check=False)
        fast = self.results(model, x, z)
        clone = copy.deepcopy(model)
        for m in clone.modules():
            assert "forward" not in m.__dict__ or m.__dict__["forward"].__self__ is m
        for y, e in zip(self.results(clone, x, z), fast):
            near(y, e)
        again = pickle.loads(pickle.dumps(model))  # comes back as it was before it was accelerated
        assert all(
            m.__dict__["forward"].__func__ is type(m).forward
            for m in again.modules()
            if "forward" in m.__dict__
        )
        for y, e in zip(self.results(again, x, z), expected):
            near(y, e)

    def test_an_exception_leaves_the_model_clean(self, model, x, z):
        expected = self.results(model, x, z)
        report = vtok_fast.accelerate(model, check=False)
        fast = self.results(model, x, z)
        block = model.get_submodule(self.part)
        handle = block.register_forward_hook(lambda *a: (_ for _ in ()).throw(KeyError("stop")))
        for call, argument in ((self.encode, x), (self.decode, z)):
            try:
                with torch.no_grad():
                    call(model, argument)
            except KeyError:
                pass
        handle.remove()
        for y, e in zip(self.results(model, x, z), fast):
            near(y, e)
        report.revert()
        for y, e in zip(self.results(model, x, z), expected):
            assert torch.equal(y, e)

    def test_hooks_within_a_block_still_run(self, model, x, z):
        expected = self.results(model, x, z)
        block, seen = model.get_submodule(self.part), []
        getattr(block, self.layer).register_forward_hook(lambda *a: seen.append(1))
        report = vtok_fast.accelerate(model, check=False)
        assert any(e.path == self.part and "has hooks" in e.why for e in report.skipped)
        for y, e in zip(self.results(model, x, z), expected):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)
        assert seen

    def test_a_layer_that_somebody_replaced_is_used(self, model, x, z):
        block = model.get_submodule(self.part)
        setattr(block, self.layer, Attached(getattr(block, self.layer)))
        report = vtok_fast.accelerate(model, check=False)
        assert any(e.path == self.part and "Attached" in e.why for e in report.skipped), report
        fast = self.results(model, x, z)
        report.revert()
        for y, e in zip(fast, self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

    def test_results_are_fresh_and_may_be_written_to(self, model, x, z):
        vtok_fast.accelerate(model, check=False)
        first = self.results(model, x, z)
        kept = [y.clone() for y in first]
        for y in first:
            y.mul_(0)  # tiling blends in place
        for y, e in zip(self.results(model, x, z), kept):
            near(y, e)

    def test_moving_to_another_dtype(self, model, x, z):
        vtok_fast.accelerate(model, check=False)
        state = copy.deepcopy(model.state_dict())
        double = self.results(model.double(), x.double(), z.double())
        plain = self.make().double().eval()
        plain.load_state_dict(state)
        for y, e in zip(double, self.results(plain, x.double(), z.double())):
            assert y.dtype == torch.float64
            torch.testing.assert_close(y, e, rtol=1e-6, atol=1e-6)

    @pytest.mark.slow
    def test_bfloat16(self, model, x, z):
        ref64 = self.results(copy.deepcopy(model).double(), x.double(), z.double())
        model.bfloat16()
        x, z = x.bfloat16(), z.bfloat16()
        eager = self.results(model, x, z)
        report = vtok_fast.accelerate(model)
        assert not any("failed" in e.why for e in report.skipped), report
        for y, e, r in zip(self.results(model, x, z), eager, ref64):
            assert y.dtype == torch.bfloat16
            assert parity.relative_errors(y, r)["whole"] <= 2 * parity.relative_errors(e, r)["whole"]

    def test_gradients(self, model, x):
        def gradients(model, x):
            model.zero_grad()
            model.train()
            y = self.encode(model, x)
            self.decode(model, y[:, : self.latent[1]]).square().mean().backward()
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        ref64 = gradients(copy.deepcopy(model).double(), x.double())
        eager = gradients(model, x)
        vtok_fast.accelerate(model, check=False)
        fast = gradients(model, x)
        bound = max(4 * (eager - ref64).norm(), 1e-5 * ref64.norm())
        assert fast.shape == ref64.shape and (fast - ref64).norm() <= bound

    def test_any_memory_format(self, model, x, z):
        report = vtok_fast.accelerate(model, check=False)
        expected = self.results(model, x, z)
        last = torch.channels_last_3d
        for y, e in zip(
            self.results(model, x.contiguous(memory_format=last), z.contiguous(memory_format=last)), expected
        ):
            torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)
        report.revert()


class Trained:
    """Beside `SwapContract`, for models of diffusers that checkpoint gradients and run under autocast."""

    def test_gradient_checkpointing(self, model, x, z):
        grads = []
        for m in (model, copy.deepcopy(model)):
            vtok_fast.accelerate(m, check=False) if grads else None
            m.train()
            m.enable_gradient_checkpointing()
            (self.decode(m, z).square().mean() + self.encode(m, x).square().mean()).backward()
            grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
        assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()

    def test_autocast(self, model, x, z):
        with torch.autocast("cpu", torch.bfloat16):
            eager = self.results(model, x, z)
            vtok_fast.accelerate(model, check=False)
            for y, e in zip(self.results(model, x, z), eager):
                assert y.dtype == e.dtype and (y - e).norm() <= 0.05 * e.norm()
