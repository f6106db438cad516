"""Models of other libraries, as they ship beside accelerated, with and without the cache of transformed
weights.

Every model has its class's own widths and random weights; a trial is one encode and one decode. With
``--full`` also the peak memory of one pass, each variant in a process of its own (on a GPU the peak stands
beside every time).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.bench import process_memory
from vtok_fast.bench.cases.vidtok import best_arrangements, difference, moved, sides, wrong
from vtok_fast.bench.harness import Missing, Settings, Trial
from vtok_fast.swap import accelerate

PEERS = "eager; on a GPU: channels last; torch.compile(channels last)"
VARIANTS = ("eager", "vtok_fast", "vtok_fast, no weight cache")


@dataclass(frozen=True)
class Model:
    """A listed model: ``library.name(**options)``, and ``small`` options that keep its structure and make it
    tiny."""

    library: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    frames: int = 9
    smallest: int = 32  # pixels that the small model needs

    def make(self, small: bool = False) -> nn.Module:
        """With random weights, also where training starts from zeros. ImportError without the library, or the
        class in it."""
        module = __import__(self.library)
        if not hasattr(module, self.name):
            raise ImportError(f"{self.library} {getattr(module, '__version__', '')} has no {self.name}")
        torch.manual_seed(0)
        model = (
            getattr(module, self.name)(**self.options | (self.small if small else {}))
            .eval()
            .requires_grad_(False)
        )
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
        return model


_TINY = {
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32, 32, 32),
}
_WAN22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_WAN22_TINY = {"base_dim": 16, "decoder_base_dim": 16, "num_res_blocks": 1}
_COSMOS_TINY = {
    "latent_channels": 4,
    "num_layers": 1,
    "encoder_block_out_channels": (16, 32, 32, 32),
    "decode_block_out_channels": (16, 32, 32, 32),
}
_LTX_TINY = {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 32, 32),
    "decoder_block_out_channels": (16, 16, 32, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
_QWEN = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
_KL = {  # that of Stable Diffusion
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_VIDTOK_FSQ = {"z_channels": 6, "double_z": False, "regularizer": "fsq"}
_VIDTOK_TINY = {"ch": 16, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}
MODELS = {
    "Wan 2.1": Model("diffusers", "AutoencoderKLWan", {}, {"base_dim": 16, "num_res_blocks": 1}),
    "Wan 2.2": Model("diffusers", "AutoencoderKLWan", _WAN22, _WAN22_TINY, smallest=64),
    "CogVideoX": Model("diffusers", "AutoencoderKLCogVideoX", {}, _TINY),
    "HunyuanVideo": Model("diffusers", "AutoencoderKLHunyuanVideo", {}, _TINY),
    "Cosmos CV8x8x8": Model("diffusers", "AutoencoderKLCosmos", {}, _COSMOS_TINY),
    "LTX Video": Model("diffusers", "AutoencoderKLLTXVideo", {}, _LTX_TINY, smallest=64),
    "QwenImage": Model("diffusers", "AutoencoderKLQwenImage", _QWEN, {"base_dim": 16, "num_res_blocks": 1}),
    "AutoencoderKL": Model("diffusers", "AutoencoderKL", _KL, _TINY, frames=2),
    "VidTok KL": Model("diffusers", "AutoencoderVidTok", {}, _VIDTOK_TINY, frames=8),
    "VidTok FSQ": Model("diffusers", "AutoencoderVidTok", _VIDTOK_FSQ, _VIDTOK_TINY, frames=8),
    "FSQ 8x5x5x5": Model("vector_quantize_pytorch", "FSQ", {"levels": [8, 5, 5, 5]}),
    "ResidualFSQ 4 x 8x5x5x3": Model(
        "vector_quantize_pytorch", "ResidualFSQ", {"levels": [8, 5, 5, 3], "num_quantizers": 4}
    ),
}


@dataclass(frozen=True)
class Case:
    model: str
    size: tuple[int, int, int]
    memory: bool = False
    small: bool = False

    def __str__(self) -> str:
        kind = f"{' small' if self.small else ''}{' memory' if self.memory else ''}"
        return f"{self.model} {'x'.join(map(str, self.size))}{kind}"


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [Case(name, (m.frames, m.smallest, m.smallest), small=True) for name, m in MODELS.items()]
    side = 256 if settings.on_gpu else 64
    chosen = [Case(name, (m.frames, side, side)) for name, m in MODELS.items()]
    if settings.full and not settings.on_gpu:
        # Large frames: of small ones the weights, and what every process takes, would be measured.
        chosen += [
            Case(name, (min(m.frames, 5) if m.frames % 2 else m.frames, 256, 256), memory=True)
            for name, m in MODELS.items()
            if m.library == "diffusers"
        ]
    return chosen


def sample(model: nn.Module, size: tuple[int, int, int]) -> Tensor:
    """A video for an autoencoder, its frames for one of images, tokens by the frame for a quantizer."""
    torch.manual_seed(1)
    if not hasattr(model, "encoder"):
        channels = getattr(model, "dim", None) or len(getattr(model, "levels", ()))
        return torch.randn(1, size[0] * size[1] * size[2], channels)
    video = torch.rand(1, 3, *size) * 2 - 1
    is_of_images = isinstance(getattr(model.encoder, "conv_in", None), nn.Conv2d)
    return video[0].transpose(0, 1).contiguous() if is_of_images else video


def latent(model: nn.Module, video: Tensor) -> Tensor:
    """What the model decodes: the mode of its distribution, or its codes."""
    encoded = model.encode(video)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]


def decode(model: nn.Module, z: Tensor) -> Tensor:
    decoded = model.decode(z)
    return getattr(decoded, "sample", decoded)


def round_trip(model: nn.Module, x: Tensor) -> Tensor:
    return decode(model, latent(model, x)) if hasattr(model, "encoder") else model(x)[0]


def build(case: Case, settings: Settings) -> Trial:
    """Raises Missing where the model's library is not there."""
    listed = MODELS[case.model]
    try:
        model, fast = (moved(listed.make(case.small), settings) for _ in range(2))
    except ImportError as error:
        raise Missing(str(error)) from None
    report = accelerate(fast, check=False)
    x = sample(model, case.size).to(settings.device, settings.working_dtype)
    eager, ours, facts = sides(model, fast, round_trip, (x,), settings)
    facts |= {
        "swapped": len(report.swapped),
        "skipped": len(report.skipped),
        "difference": _difference(model, fast, x),
    }
    found, missing = best_arrangements(model, round_trip, (x,), settings) if settings.on_gpu else ([], {})
    return Trial(
        str(case), case.model, [*eager, *found, *ours], facts, missing, wrong(facts["difference"], settings)
    )


@torch.no_grad()
def _difference(model: nn.Module, fast: nn.Module, x: Tensor) -> float:
    """The larger relative difference of both directions, on the same inputs, where tokens at a threshold do
    not count."""
    if not hasattr(model, "encoder"):
        return difference(fast(x)[0], model(x)[0])
    z = latent(model, x)
    whole = (lambda m: m._encode(x)) if hasattr(model, "_encode") else lambda m: latent(m, x)
    return max(difference(whole(fast), whole(model)), difference(decode(fast, z), decode(model, z)))


# ---- peak memory, each variant in a process of its own -----------------------------------------------------


def measure_memory(case: Case, variant: str) -> dict[str, float]:
    """What one encode and decode takes beyond the loaded model, as
    `vtok_fast.bench.process_memory.measure` says for VidTok."""
    task = {
        "model": case.model,
        "size": case.size,
        "small": case.small,
        "variant": variant,
        "threads": torch.get_num_threads(),
    }
    return process_memory.in_process(
        "vtok_fast.bench.cases.models", task, weight_cache=variant != VARIANTS[2]
    )


def _measure(task: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(task["threads"])
    model = MODELS[task["model"]].make(task["small"])
    if task["variant"] != "eager":
        accelerate(model, check=False)  # a check would leave freed memory behind that the work then reuses
    x = sample(model, tuple(task["size"]))
    return process_memory.of_pass(model, lambda: latent(model, x), lambda z: decode(model, z))


def memory(case: Case) -> dict[str, Any]:
    """The peak memory of each variant. Raises RuntimeError where the system does not tell."""
    if sys.platform != "linux":
        raise RuntimeError("peak memory is read from /proc")
    return {variant: measure_memory(case, variant) for variant in VARIANTS}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
