"""The adapter for diffusers' ``AutoencoderKLLTX2Video``: the blocks of LTX, which are told at each call
whether they are causal."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtok_fast.swap.adapters import diffusers_ltx as ltx
from vtok_fast.swap.adapters.layers import Answer, Table, lookup

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_ltx2"
NETWORKS = {"LTX2VideoEncoder3d": "conv_out", "LTX2VideoDecoder3d": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


def conv(layer: nn.Module, hidden_states: Tensor, causal: bool = True) -> Tensor:
    return ltx.conv(layer, hidden_states, bool(causal))


def resnet_block(
    block: nn.Module, inputs: Tensor, temb: Any = None, generator: Any = None, causal: bool = True
) -> Tensor:
    return ltx.resnet_block(block, inputs, temb, generator, bool(causal))


def downsample(block: nn.Module, hidden_states: Tensor, causal: bool = True) -> Tensor:
    return ltx.downsample(block, hidden_states, bool(causal))


def upsample(block: nn.Module, hidden_states: Tensor, causal: bool = True) -> Tensor:
    return ltx.upsample(block, hidden_states, bool(causal))


def encoder(network: nn.Module, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    return ltx.encoder(network, hidden_states, causal=causal or network.is_causal)


def decoder(
    network: nn.Module, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None
) -> Tensor:
    return ltx.decoder(network, hidden_states, temb, causal=causal or network.is_causal)


_SWAPS: Table = {
    **ltx.table("LTX2Video", "PerChannelRMSNorm", "Conv3d", (conv, resnet_block, downsample, upsample)),
    "LTX2VideoEncoder3d": ltx.network_swap(encoder, "PerChannelRMSNorm", "LTX2VideoCausalConv3d"),
    "LTX2VideoDecoder3d": ltx.network_swap(decoder, "PerChannelRMSNorm", "LTX2VideoCausalConv3d"),
}
