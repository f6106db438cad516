"""Weights to start from, for `train.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def initialize(model: torch.nn.Module, x: Tensor) -> None:
    """Start as a blurred copy of the video x (B, C, T, H, W), instead of learning to be one for a thousand
    steps.

    Convolutions on the main path pass each pixel on, times an orthogonal matrix of channels (a strided one
    passes on the mean of its window), and residual branches start at zero. The first layers get small random
    biases, because a norm over channels keeps the brightness of a pixel only relative to a constant (large
    ones hide the signal, and every learning rate is then too high). The encoder's last layer gives the mean
    colors, as well as its input can tell them, and the largest principal components of
    what else is in it, all with variance 1: several quantization steps. The decoder's last layer is the
    least-squares fit of x to its input.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            parts = name.split(".")
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            torch.nn.init.zeros_(layer.bias)
            if "conv2" in parts or "proj_out" in parts:
                layer.weight.zero_()
            elif not {"conv1", "q", "k", "v"} & set(parts):
                matrix = torch.nn.init.orthogonal_(layer.weight.new_empty(layer.weight.shape[:2]))
                set_pointwise(layer, matrix, keep=0.1)
            if "conv_in" in parts:
                torch.nn.init.normal_(layer.bias, std=0.03)
    scale_to(model.encoder.conv_in, model.encoder, x)
    scale_to(model.decoder.conv_in, model, x)
    features = []
    for network in (model.encoder, model.decoder):
        network.conv_out.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    model(x)
    inner = features.pop(0)
    colors = F.adaptive_avg_pool3d(x, inner.shape[2:])
    components, offset = projections(pixels(inner), pixels(colors), model.config.z_channels)
    # The log-variances of a Gaussian: the same everywhere, a seventh of the deviation of the means
    if model.config.double_z:
        components = torch.cat((components, torch.zeros_like(components)))
        offset = torch.cat((offset, torch.full_like(offset, -4.0)))
    set_pointwise(innermost(model.encoder.conv_out), components, bias=offset)
    model(x)
    outer = pixels(features[-1][:, :, -x.shape[2] :])
    solution = regress(outer, pixels(x))
    set_pointwise(
        innermost(model.decoder.conv_out), solution.T, bias=pixels(x).mean(0) - outer.mean(0) @ solution
    )
    for network in (model.encoder, model.decoder):
        network.conv_out._forward_pre_hooks.clear()


def pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T*H*W, C)"""
    return x.movedim(1, -1).flatten(0, -2)


def regress(inputs: Tensor, targets: Tensor) -> Tensor:
    """The matrix (C, K) that predicts targets (N, K) best from inputs (N, C), both without their means;
    lightly damped."""
    inputs, targets = (v.double() - v.double().mean(0) for v in (inputs, targets))
    damping = 1e-6 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(inputs.T @ inputs + damping, inputs.T @ targets).float()


def projections(inputs: Tensor, colors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Matrix (count, C) and offset (count): uncorrelated values of variance 1, first those that predict the
    colors (N, 3)."""

    def whitened(directions: Tensor, k: int) -> Tensor:  # (C, n) -> (C, k)
        values, vectors = torch.linalg.eigh(torch.cov((inputs @ directions).T))
        return directions @ (vectors / values.clamp(min=1e-8).sqrt()).flip(1)[:, :k]

    centered = inputs - inputs.mean(0)
    first = whitened(regress(inputs, colors), min(count, colors.shape[1]))
    # (C, C): what those values tell about the inputs
    explained = first @ (first.T @ (centered.T @ centered) / len(centered))
    rest = whitened(torch.eye(inputs.shape[1]) - explained, count - first.shape[1])
    matrix = torch.cat((first, rest), 1).T
    return matrix, -matrix @ inputs.mean(0)


def scale_to(layer: torch.nn.Module, network: torch.nn.Module, x: Tensor) -> None:
    """Give the output of a layer variance 1 when the network runs on x."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(y.std()))
    network(x)
    handle.remove()
    for parameter in innermost(layer).parameters():
        parameter.div_(seen[0])


def innermost(layer: torch.nn.Module) -> torch.nn.Module:
    return getattr(layer, "conv", layer)  # causal convolutions wrap one


def set_pointwise(
    layer: torch.nn.Module, matrix: Tensor, *, bias: Tensor | None = None, keep: float = 0.0
) -> None:
    """Let a convolution apply matrix (O, I) to each pixel, or to the mean of its window if it is strided,
    plus `keep` of what it was."""
    profile = torch.zeros(layer.kernel_size)
    if max(layer.stride) > 1:
        profile.fill_(1 / profile.numel())
    else:  # the pixel itself; in a causal kernel, which pads nothing by itself, it is the last frame
        causal = profile.dim() == 3 and layer.padding[0] == 0
        profile[
            tuple(k - 1 if causal and axis == 0 else k // 2 for axis, k in enumerate(layer.kernel_size))
        ] = 1
    layer.weight.mul_(keep).add_(matrix.reshape(*matrix.shape, *[1] * profile.dim()) * profile)
    if bias is not None:
        layer.bias.copy_(bias)
