"""The adapter for diffusers' ``AutoencoderKLQwenImage``: Wan's code under other names, its feature cache
included."""

from __future__ import annotations

from torch import Tensor, nn

from vtok_fast.swap.adapters import diffusers_wan as wan
from vtok_fast.swap.adapters.layers import Answer, Table, lookup

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_qwenimage"
NETWORKS = {"QwenImageEncoder3d": "conv_out", "QwenImageDecoder3d": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


def decoder(
    network: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    """As Wan's, whose blocks are also told which chunk is the first."""
    feat_idx = [0] if feat_idx is None else feat_idx
    x = wan.cached_conv(network.conv_in, x, feat_cache, feat_idx, owned=False)
    for block in [network.mid_block, *network.up_blocks]:
        x = block(x, feat_cache, feat_idx)
    return wan.cached_conv(network.conv_out, wan.rms(network.norm_out, x, "silu"), feat_cache, feat_idx)


_SWAPS: Table = {
    **wan.blocks("QwenImage"),
    "QwenImageEncoder3d": wan.network(wan.encoder, "QwenImage"),
    "QwenImageDecoder3d": wan.network(decoder, "QwenImage"),
}
