"""The terms that the papers add to the reconstruction's error, for `train.py`: a perceptual network, and a
discriminator.

The discriminator is a small PatchGAN in three dimensions with the hinge loss, LeCam's regularization (arXiv
2104.03310), and the adaptive weight of VQGAN (arXiv 2012.09841), with one difference: there both gradients
are taken at the decoder's last layer, here at the video itself, which every model has, and which needs no
second pass through the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast import metrics


class Discriminator(nn.Module):
    """Logits (B, 1, T', H', W') of video (B, 3, T, H, W): whether each patch is real. H and W are at least 8.

    `means` are running means of the logits of real and of reconstructed videos, for LeCam's term.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        steps = ((1, 2, 2), (1, 2, 2), (2, 2, 2))
        layers: list[nn.Module] = []
        before = 3
        for i, stride in enumerate(steps):
            after = width * 2**i
            layers.append(nn.Conv3d(before, after, (3, 4, 4), stride, padding=1, bias=i == 0))
            layers += [nn.GroupNorm(8, after)] * (i > 0) + [nn.LeakyReLU(0.2)]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv3d(before, 1, 3, padding=1))
        self.register_buffer("means", torch.zeros(2))

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video)


class Adversary:
    """A discriminator that learns beside a model.

    Args:
        weight: the adversarial gradient's share of the reconstruction's at the video, both by their norm.
        lecam: the weight of LeCam's term; 0: without.
        lr: of the discriminator's AdamW.
    """

    def __init__(
        self, *, weight: float, lecam: float = 0.005, lr: float = 2e-4, device: torch.device | str = "cpu"
    ):
        self.weight, self.lecam = weight, lecam
        self.discriminator = Discriminator().to(device)
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=1e-4
        )

    def term(self, video: Tensor, reconstruction_loss: Tensor) -> Tensor:
        """What to add to the loss of the model that made `video`; its gradient has `weight` times the norm
        that reconstruction_loss's has at video."""
        self.discriminator.requires_grad_(False)
        term = -self.discriminator(video).mean()
        self.discriminator.requires_grad_(True)
        (wanted,) = torch.autograd.grad(reconstruction_loss, video, retain_graph=True)
        (got,) = torch.autograd.grad(term, video, retain_graph=True)
        return self.weight * (wanted.norm() / got.norm().clamp_min(1e-12)).clamp_max(1e4) * term

    def learn(self, video: Tensor, real: Tensor) -> float:
        """One step of the discriminator on reconstructed and real videos; its hinge loss (1 for one that
        knows nothing)."""
        fake, true = self.discriminator(video.detach()), self.discriminator(real)
        hinge = (F.relu(1 + fake).mean() + F.relu(1 - true).mean()) / 2
        with torch.no_grad():
            self.discriminator.means.lerp_(torch.stack((true.mean(), fake.mean())), 0.01)
        mean_true, mean_fake = self.discriminator.means.unbind()
        pull = F.relu(true - mean_fake).square().mean() + F.relu(mean_true - fake).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        (hinge + self.lecam * pull).backward()
        self.optimizer.step()
        return hinge.item()

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def perceptual_distance() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS on VGG-16 as a differentiable function of two videos (B, 3, T, H, W) in [-1, 1] of at least
    16x16.

    Raises ValueError where torchvision or VGG's weights are absent: nothing is downloaded.
    """
    if (missing := metrics.why_no_lpips("vgg16")) is not None:
        raise ValueError(f"lpips: {missing}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False).eval()

    def distance(video: Tensor, original: Tensor) -> Tensor:
        frames = (x.transpose(1, 2).flatten(0, 1).clamp(-1, 1) for x in (video, original))
        return network.to(video.device)(*frames).mean()

    return distance
