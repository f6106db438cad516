"""How to run what a golden file of VidTok describes: whole models, single layers, chunked layers, the
quantizer, convolutions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.golden import TOLERANCE, Check, Golden, Unsupported, close, same
from vtok_fast.models.common.regularizers import FSQRegularizer
from vtok_fast.models.vidtok import VidTok
from vtok_fast.models.vidtok.blocks import (
    Caches,
    CausalConv1d,
    CausalConv3d,
    FrameAttention,
    ResBlock1d,
    ResBlock2d,
    ResBlock3d,
    SpatialDown,
    SpatialUp,
    TimeDown,
    TimeUp,
)

# Engine settings in the configuration that say nothing about the structure.
IGNORED = {"double_z", "use_checkpoint", "fix_encoder", "fix_decoder"}

# What the official classes take where a configuration says nothing, and VidTokConfig takes something else.
CLASS_DEFAULTS = {"ch_mult": (1, 2, 4, 8), "norm_type": "groupnorm"}
REGULARIZER_DEFAULTS = {
    "entropy_loss_weight": 0.0,
    "entropy_loss_annealing_steps": 0,
    "entropy_loss_annealing_factor": 1.0,
    "commitment_loss_weight": 0.0,
}

# The loss settings behind the names of the quantizer's training cases, and the number of steps.
LOSSES = {
    "official": (
        {
            "entropy_loss_weight": 0.1,
            "entropy_loss_annealing_steps": 2000,
            "entropy_loss_annealing_factor": 3,
            "commitment_loss_weight": 0.25,
        },
        500,
    ),
    "entropy_only": ({"entropy_loss_weight": 1.0}, 0),
    "commit_only": ({"commitment_loss_weight": 1.0}, 0),
    "gamma": ({"entropy_loss_weight": 1.0, "diversity_gamma": 2.5}, 0),
}


def check(golden: Golden, accelerate) -> Iterator[Check]:
    """Choose what to do by what the file holds."""
    cases = golden.cases.values()
    if "model" in golden.meta["config"]:
        part = check_model
    elif any("levels" in case for case in cases):
        part = check_quantizer
    elif any("chunk_frame_ranges" in case for case in cases):
        part = check_chunked_layers
    elif any("kernel_size" in case for case in cases):
        part = check_convolutions
    else:
        part = check_layers
    with torch.no_grad():
        yield from part(golden, accelerate)


# Whole models


def model_config(golden: Golden) -> dict[str, Any]:
    """The fields of a VidTokConfig from the keyword arguments of the official classes."""
    given = golden.meta["config"]
    causal = any(key.endswith("conv_in.conv.weight") for key in golden.under("weights"))
    version = "1.1" if re.search(r"v1[._]1", golden.meta.get("variant", "")) else "1.0"
    options = {
        **CLASS_DEFAULTS,
        **{key: value for key, value in given["model"].items() if key not in IGNORED},
    }
    if version == "1.0":
        options.pop("interpolation_mode", None)
    if not causal:  # these classes know no other levels than the default ones
        options = {
            key: value
            for key, value in options.items()
            if key not in ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us")
        }
        options["time_downsample_factor"] = 2 ** min(2, len(options["ch_mult"]) - 1)
    regularizer = {
        key: value for key, value in (given.get("regularizer_kwargs") or {}).items() if key != "sample"
    }
    kind = {"FSQRegularizer": "fsq", "DiagonalGaussianRegularizer": "kl"}.get(given["regularizer"])
    if kind is None:
        raise Unsupported(f"{golden.path}: regularizer {given['regularizer']!r} is unknown here")
    if kind == "fsq":
        regularizer = {**REGULARIZER_DEFAULTS, **regularizer}
    return {**options, **regularizer, "regularizer": kind, "version": version, "causal": causal}


def check_model(golden: Golden, accelerate) -> Iterator[Check]:
    model = VidTok(**model_config(golden)).eval()
    weights = golden.weights()
    for part in ("encoder", "decoder"):
        state = {
            key.removeprefix(part + "."): value
            for key, value in weights.items()
            if key.startswith(part + ".")
        }
        if state:
            getattr(model, part).load_state_dict(state)
    has_decoder = any(key.startswith("decoder.") for key in weights)
    with accelerate(model):
        for name, case in golden.cases.items():
            x = golden.tensors[f"in/{case.get('same_input_as', name)}/x"].float()
            expected = golden.under(f"out/{name}")
            if "share_enc_of" in case:
                expected = {**golden.under(f"out/{case['share_enc_of']}"), **expected}
            run = run_tiled if case.get("tiling") else run_whole
            yield from run(name, case, model, x, expected, has_decoder)


class Recorder(list):
    """The outputs of a module while inside."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __enter__(self):
        self.hook = self.module.register_forward_hook(lambda module, args, output: self.append(output))
        return self

    def __exit__(self, *error):
        self.hook.remove()


def run_whole(
    name: str, case: dict, model: VidTok, x: Tensor, expected: dict[str, Tensor], has_decoder: bool
) -> Iterator[Check]:
    with Recorder(model.encoder) as z:
        tokens = model.encode(x)
    yield from check_encoded(name, model, z, [tokens], expected)
    if has_decoder:
        yield close(name, "recon", model.decode(tokens), expected["recon"])
        yield close(name, "recon by forward", model(x), expected["recon"])


def run_tiled(
    name: str, case: dict, model: VidTok, x: Tensor, expected: dict[str, Tensor], has_decoder: bool
) -> Iterator[Check]:
    """Chunk by chunk: frame 0, then t_chunk_enc frames each; with overlap each decoder call but the last sees
    one latent more."""
    stream = model.stream()
    chunks = [x[:, :, start:end] for start, end in stream.chunks(x.shape[2], case["t_chunk_enc"])]
    with Recorder(model.encoder) as z:
        tokens = [stream.encode_chunk(chunk) for chunk in chunks]
    yield from check_encoded(name, model, z, tokens, expected)
    yield from check_sizes(name, "enc_chunk_frames_in", [chunk.shape[2] for chunk in chunks], expected)
    yield from check_sizes(name, "enc_chunk_latent_frames_out", [part.grid[0] for part in tokens], expected)
    if not has_decoder:
        return
    overlap = bool(case.get("overlap"))
    following = [*tokens[1:], None] if overlap else [None] * len(tokens)
    with Recorder(model.decoder) as raw:
        pieces = [
            stream.decode_chunk(part, lookahead=ahead) for part, ahead in zip(tokens, following, strict=True)
        ]
    latents_in = [part.grid[0] + (ahead is not None) for part, ahead in zip(tokens, following, strict=True)]
    yield from check_sizes(name, "dec_chunk_latent_frames_in", latents_in, expected)
    factor = model.config.time_downsample_factor
    cut = [
        video[:, :, : video.shape[2] - factor * (ahead is not None)]
        for video, ahead in zip(raw, following, strict=True)
    ]
    for i, video in enumerate(raw):
        if f"dec_chunk{i}/raw" in expected:
            yield close(name, f"dec_chunk{i}/raw", video, expected[f"dec_chunk{i}/raw"])
    frames = x.shape[2]
    yield close(name, "recon", torch.cat(cut, dim=2)[:, :, -frames:], expected["recon"])
    if (frames - 1) % factor == 0:
        # With an irregular last chunk the official code keeps filled-up frames and drops real ones instead;
        # the stream does not.
        yield close(name, "recon by the stream", torch.cat(pieces, dim=2), expected["recon"])
    yield from check_sizes(name, "dec_chunk_frames_out", [video.shape[2] for video in raw], expected)


def check_sizes(name: str, what: str, actual: list[int], expected: dict[str, Tensor]) -> Iterator[Check]:
    if what in expected:
        yield same(name, what, torch.tensor(actual), expected[what])


def check_encoded(
    name: str, model: VidTok, z: list[Tensor], tokens: list, expected: dict[str, Tensor]
) -> Iterator[Check]:
    regularizer = model.regularization
    z_pre = torch.cat(z, dim=2)
    actual = {"z_pre": z_pre}
    if model.config.regularizer == "fsq":
        actual["indices"] = torch.cat([part.indices for part in tokens], dim=1)
        actual["codes"] = torch.cat([regularizer.decode(part.indices) for part in tokens], dim=2)
        if "indices" in expected:
            actual["latent_from_indices"] = regularizer.decode(expected["indices"])
        regularizer.clamp_entropy = True  # the value of the official code
    else:
        actual["codes"] = torch.cat([part.latents for part in tokens], dim=2)
    # The loss magnifies errors of the latent (by 2 * inv_temperature in fsq), so it is taken at the given
    # latent.
    given = expected.get("z_pre", z_pre).float().split([part.grid[0] for part in tokens], dim=2)
    loss = torch.stack([regularizer(part, step=0).loss for part in given]).mean().reshape(1)
    actual |= {key: loss for key in ("aux_loss", "aux_loss_f64", "kl_loss")}
    for key, value in actual.items():
        if key in expected:
            yield (
                same(name, key, value, expected[key])
                if key == "indices"
                else close(name, key, value, expected[key])
            )


# Single layers


def make_layer(
    golden: Golden, name: str, case: dict, weights: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer of a case, from its official class if that is named, else from the name of the case."""
    version = "1.1" if name.startswith("v11") else "1.0"
    block = case.get("block", "")
    causal = not (
        name.startswith("noncausal")
        or "Noncausal" in block
        or "non-causal" in block
        or block == "ResnetBlock1D"
    )
    kind = {"causal": causal, "version": version}
    norm = {"norm_type": case.get("norm_type", "layernorm")}
    shapes = {key: value.shape for key, value in weights.items()}
    first = next(
        (shape for key, shape in shapes.items() if re.fullmatch(r"(conv1|conv|q)(\.conv)?\.weight", key)),
        None,
    )
    if first is None:
        raise Unsupported(f"{golden.path}: case {name} has no convolution that would tell its channels")
    out_channels, in_channels = first[0], first[1]
    if block.startswith("AttnBlock"):
        return FrameAttention(in_channels, **kind, **norm)
    if block.endswith("1D"):
        return ResBlock1d(in_channels, out_channels, **kind, **norm)
    if block == "ResnetBlock":
        return ResBlock2d(in_channels, out_channels, **norm)
    if block.startswith("Resnet"):
        return ResBlock3d(in_channels, out_channels, **kind, **norm)
    for part, layer in (("time_downsample", TimeDown), ("time_upsample", TimeUp)):
        if part in name:
            return layer(in_channels, **kind, **time_options(case))
    for part, layer in (("spatial_downsample", SpatialDown), ("spatial_upsample", SpatialUp)):
        if part in name:
            return layer(in_channels)
    raise Unsupported(f"{golden.path}: case {name} is of a kind unknown here (block {block!r})")


def time_options(case: dict) -> dict[str, Any]:
    names = {"interpolation_mode": "mode", "num_temp_upsample": "first_frames"}
    return {names[key]: case[key] for key in names if key in case}


def check_layers(golden: Golden, accelerate) -> Iterator[Check]:
    for name, case in golden.cases.items():
        weights = golden.weights(f"weights/{name}")
        layer = make_layer(golden, name, case, weights).eval()
        layer.load_state_dict(weights)
        with accelerate(layer):
            yield close(
                name, "y", layer(golden.tensors[f"in/{name}/x"].float()), golden.tensors[f"out/{name}/y"]
            )


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def make_conv(case: dict, version: str, dimensions: int) -> nn.Module:
    options = {key: _tuple(case[key]) for key in ("stride", "dilation") if key in case}
    cls = CausalConv1d if dimensions == 3 else CausalConv3d
    return cls(
        case["chan_in"], case["chan_out"], _tuple(case["kernel_size"]), version=version, **options
    ).eval()


def check_convolutions(golden: Golden, accelerate) -> Iterator[Check]:
    for name, case in golden.cases.items():
        x = golden.tensors[f"in/{name}/x"].float()
        for key, expected in golden.under(f"out/{name}").items():
            layer = make_conv(case, "1.1" if key.startswith("v11") else "1.0", x.dim())
            layer.load_state_dict(golden.weights(f"weights/{name}"))
            with accelerate(layer):
                yield close(name, key, layer(x), expected)


def check_chunked_layers(golden: Golden, accelerate) -> Iterator[Check]:
    """Version 1.1 layers chunk by chunk; `cache_offset` is the look-ahead at a convolution's input."""
    for name, case in golden.cases.items():
        weights = golden.weights(f"weights/{name}")
        x, expected = golden.tensors[f"in/{name}/x"].float(), golden.under(f"out/{name}")
        if "kernel_size" in case:
            layer = conv = make_conv(case, "1.1", x.dim())
        else:
            layer = TimeDown if "downsample" in name else TimeUp
            layer = layer(case["channels"], version="1.1", **time_options(case)).eval()
            conv = layer.conv
        layer.load_state_dict(weights)
        lookahead = {conv: case.get("cache_offset", case.get("conv_cache_offset", 0))}
        with accelerate(layer):
            caches = None
            for i, (start, end) in enumerate(case["chunk_frame_ranges"]):
                caches = Caches(caches, lookahead)
                yield close(name, f"chunk{i}/y", layer(x[:, :, start:end], caches), expected[f"chunk{i}/y"])
                if f"chunk{i}/cache_tail" in expected:
                    yield close(
                        name, f"chunk{i}/cache_tail", caches.frames[conv], expected[f"chunk{i}/cache_tail"]
                    )
            if "full" in expected:
                yield close(name, "full", layer(x), expected["full"])


# The quantizer


def check_quantizer(golden: Golden, accelerate) -> Iterator[Check]:
    eps = {
        key: golden.meta["config"][key] for key in ("eps", "inv_temperature") if key in golden.meta["config"]
    }
    for name, case in golden.cases.items():
        options = {key: case[key] for key in ("dim", "num_codebooks") if key in case}
        layer = FSQRegularizer(case["levels"], **options, **eps, clamp_entropy=True)
        layer.load_state_dict(golden.weights(f"weights/{name}"))
        given, expected = golden.under(f"in/{name}"), golden.under(f"out/{name}")
        with accelerate(layer):
            yield from check_rounding(name, layer, given, expected)
        yield from check_training(golden, name, case, eps, given, expected)
    steps = golden.tensors.get("in/annealing/n_steps")
    if steps is not None:
        layer = FSQRegularizer((2,), **LOSSES["official"][0])
        weights = torch.tensor([layer.entropy_weight(int(step)) for step in steps])
        yield close(
            "annealing", "entropy_loss_weight", weights, golden.tensors["out/annealing/entropy_loss_weight"]
        )


def check_rounding(
    name: str, layer: FSQRegularizer, given: dict[str, Tensor], expected: dict[str, Tensor]
) -> Iterator[Check]:
    """Codes and indices. Some files hold both the official index, which for 26 and more levels is cut off
    instead of rounded, and the rounded one; ours is the rounded one."""
    codes, indices, _ = layer(given["z"])
    yield close(name, "codes", codes, expected["codes"])
    yield same(name, "indices", indices, expected.get("indices_rounded", expected["indices"]))
    if "codes_from_indices" in expected:
        wanted = expected.get("indices_rounded", expected["indices"])
        yield close(name, "codes_from_indices", layer.decode(wanted), expected["codes_from_indices"])
    if "implicit_codebook" in expected:
        codebook = layer.decode(torch.arange(layer.codebook_size).unsqueeze(0))[0].T
        yield close(name, "implicit_codebook", codebook, expected["implicit_codebook"])
    for part in ("near_threshold", "level_centres"):
        if f"z_{part}" not in given:
            continue
        codes, indices, _ = layer(given[f"z_{part}"].movedim(-1, 1))  # (1, n, channels) in the file
        yield close(name, f"{part}_codes", codes.movedim(1, -1), expected[f"{part}_codes"])
        wanted = expected.get(f"{part}_indices_rounded", expected[f"{part}_indices"])
        yield same(name, f"{part}_indices", indices, wanted)
    if "z_edge" in given:
        # Within two float32 steps of a threshold one level of difference is right too (codes are q/width,
        # rounded).
        codes = layer(given["z_edge"].movedim(-1, 1)).codes.movedim(1, -1)
        width = codes.new_tensor([level // 2 for level in layer.levels])
        steps = ((codes - expected["edge_codes"]) * width).abs().max().item()
        yield Check(name, "edge_codes, levels apart", steps, 1.0 + TOLERANCE)


def check_training(
    golden: Golden, name: str, case: dict, eps: dict, given: dict, expected: dict
) -> Iterator[Check]:
    """Losses and their gradients, in float64 as the file holds them, and the losses in float32."""
    for batch in sorted({key.split("/")[0] for key in given if key.startswith("train_")}):
        outputs = {
            key.removeprefix(batch + "/"): value
            for key, value in expected.items()
            if key.startswith(batch + "/")
        }
        z = given[f"{batch}/z"].double().requires_grad_()
        with torch.enable_grad():
            layer = FSQRegularizer(case["levels"], **eps)
            (grad,) = torch.autograd.grad((layer(z).codes * given[f"{batch}/upstream_grad"]).sum(), z)
            yield close(name, f"{batch}/grad_z_of_codes_f64", grad, outputs["grad_z_of_codes_f64"])
            for loss in sorted({key.split("/")[0] for key in outputs if "/" in key}):
                if loss not in LOSSES:
                    raise Unsupported(f"{golden.path}: case {name}, loss settings {loss!r} are unknown here")
                options, step = LOSSES[loss]
                layer = FSQRegularizer(case["levels"], **eps, **options, clamp_entropy=True)
                value = layer(z, step=step).loss
                (grad,) = torch.autograd.grad(value, z)
                yield close(
                    name, f"{batch}/{loss}/aux_loss_f64", value.reshape(1), outputs[f"{loss}/aux_loss_f64"]
                )
                yield close(
                    name, f"{batch}/{loss}/grad_z_of_aux_f64", grad, outputs[f"{loss}/grad_z_of_aux_f64"]
                )
                single = layer(given[f"{batch}/z"], step=step).loss
                yield close(name, f"{batch}/{loss}/aux_loss", single.reshape(1), outputs[f"{loss}/aux_loss"])
