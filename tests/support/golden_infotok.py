"""How to run what a golden file of InfoTok describes: the whole network at several rates, and its transformer
alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support.golden import Check, Golden, Unsupported, close, same
from support.golden_cosmos import load, model_config
from support.golden_vidtok import Recorder
from vtok_fast.models.common.transformer import apply_rotary, rotary_frequencies, rotary_table
from vtok_fast.models.infotok import InfoTok
from vtok_fast.models.infotok.model import DROPPED, frame_rates
from vtok_fast.models.infotok.transformer import Block, block_causal_mask, rotary_angles
from vtok_fast.ops.token_packing import select_tokens
from vtok_fast.ops.token_packing.packed_tokens import PackedTokens

# Of vit_config: what the released model does not use.
IGNORED = {"switch_rotary_to_1d", "max_sequence_length", "max_sequence_length_1d"}
NOT_KNOWN = {"concat_decode_2d": False, "special_attn": False, "method": "mse"}
STRATEGIES = {"elbo": "elbo", "forward": "elbo", "global_elbo": "global_elbo", "global_elbo_bin": "bin"}


def check(golden: Golden, accelerate) -> Iterator[Check]:
    with torch.no_grad():
        yield from (check_network if "channels_mult" in golden.meta["config"] else check_transformer)(
            golden, accelerate
        )


def transformer_options(golden: Golden, given: dict[str, Any]) -> dict[str, Any]:
    for key, only in NOT_KNOWN.items():
        if given.get(key, only) != only:
            raise Unsupported(f"{golden.path}: {key}={given[key]!r} is unknown here")
    return {key: value for key, value in given.items() if key not in IGNORED and key not in NOT_KNOWN}


# The network


def check_network(golden: Golden, accelerate) -> Iterator[Check]:
    weights = golden.weights()
    given = dict(golden.meta["config"])
    extra = {
        key: given.pop(key)
        for key in ("vit_config", "use_vit", "freeze_original", "rate_strategy")
        if key in given
    }
    if not extra.get("use_vit", True):
        raise Unsupported(f"{golden.path}: InfoTok without its transformers is unknown here")
    base = Golden(golden.path, {**golden.meta, "config": given}, golden.tensors)
    model = InfoTok(**model_config(base, weights), **transformer_options(golden, extra["vit_config"])).eval()
    yield from load(model, weights)
    with accelerate(model):
        for name in golden.cases:
            yield from run_case(golden, name, model)


def run_case(golden: Golden, name: str, model: InfoTok) -> Iterator[Check]:
    x, expected = golden.tensors[f"in/{name}/x"].float(), golden.under(f"out/{name}")
    with Recorder(model.encoder) as encoder_out, Recorder(model.quant_conv) as z:
        score = model.scores(x)
    codes, indices, _ = model.quantizer(z[0])
    before_decoder = model.transform(model.vit_decoder, model.post_quant_conv(codes))
    actual = {
        "encoder_out": encoder_out[0],
        "vit_encode_out": model.transform(model.vit_encoder, encoder_out[0]),
        "z_pre": z[0],
        "codes": codes,
        "indices": indices,
        "vit_decode_out_full": before_decoder,
        "recon_full": model.decoder(before_decoder),
        "score": score,
    }
    runs = dict.fromkeys(key.partition("/")[0] for key in expected if "/" in key)
    for key, value in expected.items():
        if "/" not in key:
            if key not in actual:
                raise Unsupported(f"{golden.path}: case {name} holds {key!r}, which is unknown here")
            yield (
                same(name, key, actual[key], value)
                if key == "indices"
                else close(name, key, actual[key], value)
            )
    for run in runs:
        yield from check_rate(golden, name, run, model, x, score, {**actual, **expected})


def check_rate(
    golden: Golden, name: str, run: str, model: InfoTok, x: Tensor, score: Tensor, known: dict[str, Tensor]
) -> Iterator[Check]:
    match = re.fullmatch(r"(.+)_r([\d.]+)", run)
    if match is None or match[1] not in STRATEGIES:
        raise Unsupported(f"{golden.path}: case {name}, the run {run!r} is unknown here")
    rate = float(match[2])
    choice = {"rate": rate, "rate_strategy": STRATEGIES[match[1]], "selection": "threshold"}
    if choice["rate_strategy"] != "elbo":
        choice["elbo_mean"] = float(golden.tensors[f"in/{name}/elbo_mean"])
    expected = {key.partition("/")[2]: value for key, value in known.items() if key.startswith(run + "/")}
    tokens = model.encode(x, **choice)
    kept = tokens.indices != DROPPED
    where = f"{name}/{run}"
    yield same(where, "mask", kept, expected["mask"])
    yield same(where, "kept", kept.flatten(1).sum(1), expected["kept"])
    yield same(where, "indices", tokens.indices[kept], known["indices"][kept])
    if "allocated_ratios" in expected:  # float32 in the file
        yield close(
            where,
            "allocated_ratios",
            frame_rates(score, torch.full(score.shape[:1], rate)),
            expected["allocated_ratios"],
        )
    if "allocated_rate" in expected:
        n = kept[0].numel()
        rates = expected["allocated_rate"].reshape(-1)
        yield same(
            where,
            "kept of the allocated rate",
            kept.flatten(1).sum(1),
            n - 1 - ((1 - rates) * (n - 1)).floor().long(),
        )
    if "recon" in expected:
        stored = PackedTokens.from_bytes(model.pack(tokens).to_bytes(model.codebook_size))
        yield close(where, "recon", model.decode(tokens), expected["recon"])
        yield close(where, "recon from bytes", model.decode(stored), expected["recon"])
        yield close(where, "recon by forward", model(x, **choice), expected["recon"])


# The transformer alone


def check_transformer(golden: Golden, accelerate) -> Iterator[Check]:
    options = transformer_options(golden, golden.meta["config"])
    width = {
        "z_channels": options["hidden_size"],
        "channels": 4,
        "channels_mult": (1, 1, 1),
        "num_res_blocks": 1,
    }
    model = InfoTok(**width, **options).eval()
    model.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "vit" not in key} | golden.weights()
    )
    with accelerate(model):
        for name in golden.cases:
            yield from check_clip(golden, name, model)
        yield from check_block(golden, model.vit_encoder[0], options["theta"])
    yield from check_rotary(golden, options["theta"])
    yield from check_order(golden)


def check_clip(golden: Golden, name: str, model: InfoTok) -> Iterator[Check]:
    x, expected = golden.tensors[f"in/{name}/x"].float(), golden.under(f"out/{name}")
    t, h, w = x.shape[2:]
    with Recorders(model.vit_encoder) as outputs:
        encoded = model.transform(model.vit_encoder, x)
    yield close(name, "vit_encode", encoded, expected["vit_encode"])
    yield close(name, "vit_decode", model.transform(model.vit_decoder, x), expected["vit_decode"])
    yield same(name, "mask", ~block_causal_mask(t, h * w), expected["mask_true_is_blocked"])
    for i, output in enumerate(outputs):
        if f"vit_encoder_block{i}" in expected:
            yield close(name, f"vit_encoder_block{i}", output[0], expected[f"vit_encoder_block{i}"])


class Recorders:
    """The outputs of each of several modules while inside."""

    def __init__(self, modules):
        self.recorders = [Recorder(module) for module in modules]

    def __enter__(self) -> list[Recorder]:
        return [recorder.__enter__() for recorder in self.recorders]

    def __exit__(self, *error):
        for recorder in self.recorders:
            recorder.__exit__(*error)


def check_block(golden: Golden, block: Block, theta: float) -> Iterator[Check]:
    if "in/block/x" not in golden.tensors:
        return
    x, expected = golden.tensors["in/block/x"].float(), golden.under("out/block")
    t, h, w = 2, 3, 4  # the notes of the file say so
    angles = rotary_angles(h, w, x.shape[-1] // block.attention.mha.num_heads, theta)
    actual = {
        "attention": block.attention(x, angles, t),
        "mlp": block.mlp(x),
        "rmsnorm": block.attention_norm(x),
        "block": block(x, angles, t),
    }
    for key, value in expected.items():
        yield close("block", key, actual[key], value)


def check_rotary(golden: Golden, theta: float) -> Iterator[Check]:
    """q and k are (B, positions, heads, D), those of the 2D case (B, rows, columns, heads, D)."""
    for name in ("rope1d", "rope2d"):
        for key in ("q", "k"):
            x = golden.tensors.get(f"in/{name}/{key}")
            if x is None:
                continue
            dim, size = x.shape[-1], x.shape[1:-2]
            if name == "rope1d":
                angles = rotary_table(torch.arange(size[0])[:, None], (rotary_frequencies(dim, theta),))
            else:
                angles = rotary_angles(*size, dim, theta)
            y = apply_rotary(x.flatten(1, -3).transpose(1, 2), angles).transpose(1, 2).reshape(x.shape)
            yield close(name, key, y, golden.tensors[f"out/{name}/{key}"])
    for key, table in golden.under("out/rope2d").items():
        if key.startswith("table_cos_sin"):
            angles = rotary_angles(*table.shape[:2], 2 * table.shape[2], theta).reshape(table.shape[:-1])
            yield close("rope2d", key, torch.stack((angles.cos(), angles.sin()), dim=-1), table)


def check_order(golden: Golden) -> Iterator[Check]:
    """The masks that keep the first tokens of each frame: index <= rate * n, in order or with stride 4."""
    if "in/order_masks/rates" not in golden.tensors:
        return
    rates = golden.tensors["in/order_masks/rates"]
    for key, method in (("order", "order"), ("order_4", "order_strided")):
        expected = golden.tensors[f"out/order_masks/{key}"]  # (B, heads or channels, t, n)
        n = expected.shape[-1]
        budget = (rates * n).floor().add(1).clamp_max(n).long()
        keep = select_tokens(torch.zeros(*rates.shape, n), budget, method=method, stride=4)
        yield same("order_masks", key, keep[:, None].expand(expected.shape), expected)
