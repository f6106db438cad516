"""How to run what a golden file of Cosmos describes: whole models, single layers, the patcher, the quantizer,
convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from support.golden import Check, Golden, Unsupported, close, same
from support.golden_vidtok import Recorder, check_rounding
from vtok_fast.models.cosmos import Cosmos, blocks
from vtok_fast.models.cosmos.checkpoint import CONSTANTS, fit_constants
from vtok_fast.models.cosmos.config import CosmosConfig
from vtok_fast.models.cosmos.patcher import Patcher, UnPatcher
from vtok_fast.models.cosmos.quantizers import FSQuantizer, ResidualFSQuantizer

# Entries of the configuration that say nothing beyond the ones that are read.
IGNORED = {
    "encoder",
    "decoder",
    "quantizer",
    "embedding_dim",
    "num_quantizers",
    "persistent_quantizer",
    "name",
}


def check(golden: Golden, accelerate) -> Iterator[Check]:
    """Choose what to do by what the file holds."""
    cases = golden.cases.values()
    if "channels_mult" in golden.meta["config"]:
        part = check_model
    elif any("levels" in case for case in cases):
        part = check_quantizer
    elif any("patch_method" in case for case in cases):
        part = check_patcher
    elif any("kernel_size" in case for case in cases):
        part = check_convolutions
    else:
        part = check_layers
    with torch.no_grad():
        yield from part(golden, accelerate)


# Whole models


def model_config(golden: Golden, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a CosmosConfig from the keyword arguments of the official classes, and from the keys of
    the state dict."""
    given = golden.meta["config"]
    if {given.get("encoder"), given.get("decoder")} != {"FACTORIZED"} or given.get(
        "quantizer", "FSQ"
    ) != "FSQ":
        raise Unsupported(f"{golden.path}: only factorized networks and FSQ are known here")
    known = {field.name for field in fields(CosmosConfig)} | IGNORED
    if unknown := sorted(set(given) - known):
        raise Unsupported(f"{golden.path}: unknown entries in the configuration: {', '.join(unknown)}")
    options = {key: value for key, value in given.items() if key not in IGNORED}
    options["formulation"] = given.get("formulation", "FSQ")
    options["layout"] = "predict1" if any(key.endswith(".wavelets") for key in weights) else "0.1"
    if options["formulation"] != "FSQ" and options["layout"] == "0.1" and given["temporal_compression"] == 4:
        options["decoder_channels_mult"] = (2, 4)  # the official class overrides it
    return options


def load(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[Check]:
    """Load the weights under their keys, and compare the constants among them with the model's own."""
    own = model.state_dict()
    for key, value in weights.items():
        if key.rpartition(".")[2] in CONSTANTS and key in own:
            yield close("constants", key, own[key].float(), value)
    model.load_state_dict(fit_constants(weights, own))  # a file may leave constants out


def check_model(golden: Golden, accelerate) -> Iterator[Check]:
    weights = golden.weights()
    model = Cosmos(**model_config(golden, weights)).eval()
    yield from load(model, weights)
    with accelerate(model):
        for name in golden.cases:
            yield from run_case(
                name, model, golden.tensors[f"in/{name}/x"].float(), golden.under(f"out/{name}")
            )


def run_case(name: str, model: Cosmos, x: Tensor, expected: dict[str, Tensor]) -> Iterator[Check]:
    with Recorder(model.encoder) as encoder_out, Recorder(model.quant_conv) as z:
        tokens = model.encode(x)
    actual = {"encoder_out": encoder_out[0], "z_pre": z[0], "moments": z[0], "recon": model.decode(tokens)}
    if tokens.indices is None:
        actual["latent"] = actual["mean"] = tokens.latents
        actual["logvar"] = z[0].chunk(2, dim=1)[1].clamp(-30.0, 20.0) if "logvar" in expected else None
    else:
        actual["indices"] = tokens.indices
        actual["codes"] = model.quantizer.decode(tokens.indices)
    for key, value in expected.items():
        if key not in actual:
            raise Unsupported(f"case {name} holds {key!r}, which is unknown here")
        yield (
            same(name, key, actual[key], value) if key == "indices" else close(name, key, actual[key], value)
        )
    yield close(name, "recon by forward", model(x), expected["recon"])


# Single layers


def make_layer(golden: Golden, name: str, case: dict, weights: dict[str, Tensor]) -> nn.Module:
    channels = case["x"][1]
    if name.startswith("norm"):
        return blocks.Norm(
            channels, 1 if "per_frame" in name else int(name.split("_")[1].removesuffix("groups"))
        )
    if "spatial_down" in case:
        return blocks.HybridDown(channels, spatial=case["spatial_down"], temporal=case["temporal_down"])
    if "spatial_up" in case:
        return blocks.HybridUp(channels, spatial=case["spatial_up"], temporal=case["temporal_up"])
    if name.startswith("attn"):
        return blocks.TemporalAttention(channels) if "temporal" in name else blocks.SpatialAttention(channels)
    if name.startswith("resblock"):
        return blocks.ResBlock(channels, case["y"][1])
    raise Unsupported(f"{golden.path}: case {name} is of a kind unknown here")


def check_layers(golden: Golden, accelerate) -> Iterator[Check]:
    for name, case in golden.cases.items():
        weights = golden.weights(f"weights/{name}")
        layer = make_layer(golden, name, case, weights).eval()
        layer.load_state_dict(weights)
        with accelerate(layer):
            yield close(
                name, "y", layer(golden.tensors[f"in/{name}/x"].float()), golden.tensors[f"out/{name}/y"]
            )


def check_convolutions(golden: Golden, accelerate) -> Iterator[Check]:
    options = ("stride", "time_stride", "dilation", "time_dilation", "padding")
    for name, case in golden.cases.items():
        layer = blocks.CausalConv3d(
            case["chan_in"],
            case["chan_out"],
            tuple(case["kernel_size"]),
            **{key: case[key] for key in options if key in case},
        )
        yield same(name, "time_pad", torch.tensor(layer.time_pad), torch.tensor(case["time_pad"]))
        layer.load_state_dict(golden.weights(f"weights/{name}"))
        with accelerate(layer):
            yield close(
                name, "y", layer(golden.tensors[f"in/{name}/x"].float()), golden.tensors[f"out/{name}/y"]
            )


def check_patcher(golden: Golden, accelerate) -> Iterator[Check]:
    for name, case in golden.cases.items():
        kind = (case["patch_size"], case["patch_method"])
        x = golden.tensors[f"in/{name}/x"]
        patched = Patcher(*kind)(x)
        yield close(name, "patched", patched, golden.tensors[f"out/{name}/patched"])
        yield close(name, "round trip", UnPatcher(*kind)(patched), x)
        unpatched = UnPatcher(*kind)(golden.tensors[f"in/{name}/coeffs"])
        yield close(name, "unpatched_coeffs", unpatched, golden.tensors[f"out/{name}/unpatched_coeffs"])


def check_quantizer(golden: Golden, accelerate) -> Iterator[Check]:
    for name, case in golden.cases.items():
        given, expected = golden.under(f"in/{name}"), golden.under(f"out/{name}")
        if "num_quantizers" in case:
            layer = ResidualFSQuantizer(case["levels"], num_quantizers=case["num_quantizers"])
        else:
            layer = FSQuantizer(
                case["levels"], **{key: case[key] for key in ("dim", "num_codebooks") if key in case}
            )
        layer.load_state_dict(golden.weights(f"weights/{name}"))
        with accelerate(layer):
            yield from check_rounding(name, layer, given, expected)
            if "grad_z" in expected:
                z = given["z"].clone().requires_grad_()
                with torch.enable_grad():
                    (grad,) = torch.autograd.grad((layer(z).codes * given["upstream_grad"]).sum(), z)
                yield close(name, "grad_z", grad, expected["grad_z"])
            if "dummy_loss" in expected:
                zeros = expected["dummy_loss"]
                yield close(name, "dummy_loss", layer(given["z"], step=0).loss.expand(zeros.shape), zeros)
