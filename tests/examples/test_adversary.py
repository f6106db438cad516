"""The discriminator of the training example: its weight, what it learns, and LeCam's term."""

from __future__ import annotations

import pytest
import torch
from adversary import Adversary, Discriminator


def videos(seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, 5, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [8, 16, 20])
@pytest.mark.parametrize("frames", [1, 5])
def test_small_videos_have_logits(size, frames):
    assert Discriminator(8)(videos(0, size)[:, :, :frames]).numel() >= 2


@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_the_adversarial_gradient_is_a_share_of_the_other(weight):
    torch.manual_seed(0)
    adversary, y, x = Adversary(weight=weight), videos(0).requires_grad_(), videos(1)
    loss = (y - x).abs().mean()
    adversary.discriminator.zero_grad()
    (ours,) = torch.autograd.grad(adversary.term(y, loss), y, retain_graph=True)
    (other,) = torch.autograd.grad(loss, y)
    torch.testing.assert_close(ours.norm(), weight * other.norm())
    assert all(p.grad is None and p.requires_grad for p in adversary.discriminator.parameters())


def test_it_learns_to_tell_noise_from_a_ramp():
    torch.manual_seed(0)
    adversary = Adversary(weight=1.0, lr=1e-3)
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 5, 16, 16)
    losses = [adversary.learn(videos(step), ramp) for step in range(30)]
    assert losses[0] > 0.8 and losses[-1] < 0.3
    real, fake = adversary.discriminator.means
    assert real > 0 > fake
    y = videos(99).requires_grad_()
    step = torch.autograd.grad(adversary.term(y, y.abs().mean()), y)[0]
    with torch.no_grad():  # a step down the term is one towards what counts as real
        before, after = (adversary.discriminator(v).mean() for v in (y, y - step / step.norm()))
    assert after > before


def test_lecam_holds_the_logits_together():
    gaps = []
    for lecam in (0.0, 10.0):
        torch.manual_seed(0)
        adversary = Adversary(weight=1.0, lecam=lecam, lr=1e-3)
        for step in range(20):
            adversary.learn(videos(step), videos(step).flip(1) * 0.3)
        with torch.no_grad():
            gaps.append(
                (
                    adversary.discriminator(videos(50).flip(1) * 0.3) - adversary.discriminator(videos(50))
                ).mean()
            )
    assert gaps[1] < 0.7 * gaps[0]
