"""The demo: a real clip through VidTok in plain PyTorch and accelerated, and what the difference is.

It writes a folder: `tokens.safetensors` (read it with `Tokens.load`), `reconstruction.mp4`, `demo.png`, and
`demo.json` with every number that is printed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtok_fast
from vtok_fast import parity
from vtok_fast.bench import process_memory
from vtok_fast.commands import demo_picture
from vtok_fast.commands.clips import DEMO_CLIP, HERE, demo_clip
from vtok_fast.io.files import write_atomically
from vtok_fast.io.tokens import Tokens
from vtok_fast.io.video import VideoError, read_video, write_video
from vtok_fast.models import VidTok

DEFAULT_VIDEO = HERE
DEFAULT_START = {DEMO_CLIP: 76}  # a scene with a cyclist; the demo model saw none of the first 137 frames
DEFAULT_CONFIG = "tiny"
WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights" / "vidtok_tiny.safetensors"
SMALL = 5_000_000  # parameters; a larger model gets one chunk and fewer rounds unless asked for more


@dataclass(frozen=True)
class Options:
    """What to run. None: as suits the clip and the model.

    Attributes:
        video: a file; None: the demo's clip. config: a VidTok configuration by name.
        checkpoint: its weights; None: the demo weights of the package for "tiny", else random ones (time and
            parity mean something then, the picture does not).
        output: the folder to write.
        size: height and width, pixels; the frame is scaled and its center taken.
        start: the first frame. chunks: how many chunks of 17 frames (16 where the model is not causal), each
            on its own.
        rounds: timed repetitions of each variant, in turns.
    """

    video: Path | None = None
    config: str = DEFAULT_CONFIG
    checkpoint: Path | None = None
    output: Path = Path("demo")
    size: int = 128
    start: int | None = None
    chunks: int | None = None
    rounds: int | None = None


def run(options: Options, say: Callable[[Any], None] = lambda text: None) -> dict[str, Any]:
    """Run the demo; `say` gets lines and tables for a person as they come. Returns what `demo.json` holds.

    Raises FileNotFoundError, VideoError, ValueError (an option) or OSError (the output), each naming what is
    wrong.
    """
    for name in ("chunks", "rounds", "size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    demo_picture.need_matplotlib()
    model, trained = load_model(options)
    if options.video is None:
        video = demo_clip(say)
        start = DEFAULT_START.get(video.name, 0) if options.start is None else options.start
        options = replace(options, video=video, start=start)
    parameters = sum(p.numel() for p in model.parameters())
    demo_weights = ", the package's demo weights" if trained and options.checkpoint is None else ""
    say(
        f"VidTok {model.config.name}: {parameters:,} parameters{demo_weights}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )
    if not trained:
        say(
            f"WARNING: without CHECKPOINT the configuration {options.config} runs on RANDOM WEIGHTS: times, "
            f"memory and parity are "
            "real, the reconstruction is noise"
        )
    clips, fps = load_clips(options, model, few=parameters > SMALL)
    options.output.mkdir(parents=True, exist_ok=True)
    count, _, frames, height, width = clips.shape
    say(f"{count} x {frames} frames of {height}x{width} from {options.video}")

    with torch.inference_mode():
        eager = copy.deepcopy(model)
        eager_tokens, eager_video = roundtrip(eager, clips)
        report = vtok_fast.accelerate(model)
        say(report)
        fast_tokens, fast_video = roundtrip(model, clips)
        result: dict[str, Any] = {
            "model": model.config.name,
            "parameters": parameters,
            "trained": trained,
            "video": str(options.video),
            "shape": list(clips.shape),
            "fps": fps,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "swapped": len(report.swapped),
            "skipped": len(report.skipped),
            "compression": compression(eager_tokens, clips),
            "psnr_db": psnr(fast_video, clips),
            "eager_psnr_db": psnr(eager_video, clips),
            "parity": compare(eager, model, clips, eager_tokens, fast_tokens),
        }
        say(_parity_lines(result["parity"]))
        rounds = options.rounds or (2 if parameters > SMALL else 5)
        result["seconds"] = time_both(eager, model, clips, eager_tokens, rounds)
    result["peak_bytes"] = measure_memory(model, (frames, height, width))
    result["ratios"] = ratios(result)
    say(_cost_table(result))

    fast_tokens.save(options.output / "tokens.safetensors")
    write_video(options.output / "reconstruction.mp4", fast_video.transpose(0, 1).flatten(1, 2), fps)
    demo_picture.draw(options.output / "demo.png", clips, fast_video, result)
    result["report"] = report.to_dict()
    write_atomically(
        options.output / "demo.json",
        lambda temporary: Path(temporary).write_text(json.dumps(result, indent=2) + "\n"),
    )
    say(f"Written to {options.output}/: demo.png, reconstruction.mp4, tokens.safetensors, demo.json")
    return result


def load_model(options: Options) -> tuple[VidTok, bool]:
    """The model, and whether its weights are trained ones."""
    if options.checkpoint is not None:
        return VidTok.from_checkpoint(options.checkpoint, options.config).eval(), True
    if options.config == DEFAULT_CONFIG:
        return VidTok.from_checkpoint(WEIGHTS, options.config).eval(), True
    torch.manual_seed(0)
    return VidTok(options.config).eval(), False


def load_clips(options: Options, model: VidTok, *, few: bool) -> tuple[Tensor, float]:
    """(chunks, 3, T, size, size) and the frames per second."""
    path = demo_clip() if options.video is None else options.video
    start = options.start if options.start is not None else 0
    chunks = options.chunks or (1 if few else 3)
    factor, causal = model.config.time_downsample_factor, model.config.causal
    length = 16 + causal
    clip = read_video(path, size=(options.size, options.size), start=start, frames=chunks * length)
    available = clip.video.shape[1]
    if available < length:  # a short video: as many frames as come back complete
        length = (available - causal) // factor * factor + causal
        if length < 1:
            raise VideoError(
                f"video: {path} has {available} frames from frame {start} on, {model.config.name} needs "
                f"{factor}"
            )
    chunks = min(chunks, available // length)
    return clip.video[:, : chunks * length].unflatten(1, (chunks, length)).transpose(
        0, 1
    ).contiguous(), clip.fps


def encode(model: VidTok, clips: Tensor) -> Tokens:
    """Chunk by chunk, as a program would that has no memory to spare; the tokens as one batch."""
    parts = [model.encode(clip[None]) for clip in clips]
    kind = "latents" if parts[0].indices is None else "indices"
    return replace(parts[0], **{kind: torch.cat([part.data for part in parts])})


def decode(model: VidTok, tokens: Tokens) -> Tensor:
    kind = "latents" if tokens.indices is None else "indices"
    return torch.cat([model.decode(replace(tokens, **{kind: data[None]})) for data in tokens.data])


def roundtrip(model: VidTok, clips: Tensor) -> tuple[Tokens, Tensor]:
    tokens = encode(model, clips)
    return tokens, decode(model, tokens)


def compression(tokens: Tokens, clips: Tensor) -> dict[str, Any]:
    """Bits of the video, 8 per value, against bits of the tokens."""
    video = clips.numel() * 8
    config = tokens.config
    bits = (
        math.log2(math.prod(config["levels"])) if tokens.indices is not None else 32.0 * config["z_channels"]
    )
    positions = tokens.batch * math.prod(tokens.grid)
    return {
        "tokens": positions,
        "bits_per_token": bits,
        "video_bytes": video // 8,
        "token_bytes": math.ceil(positions * bits / 8),
        "ratio": video / (positions * bits),
    }


def psnr(video: Tensor, reference: Tensor) -> float:
    """In dB, for values in [-1, 1]; infinite for equal videos."""
    error = (video.clamp(-1, 1) - reference).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def compare(
    eager: VidTok, fast: VidTok, clips: Tensor, eager_tokens: Tokens, fast_tokens: Tokens
) -> dict[str, Any]:
    """Tokens against each other; latents and decoded video (of the same tokens) against float64, by the
    contract *close*."""
    double = copy.deepcopy(eager).double()
    latents = {
        name: torch.cat([m.encoder(clip[None].to(d)) for clip in clips])
        for name, m, d in (
            ("fast", fast, torch.float32),
            ("eager", eager, torch.float32),
            ("ref", double, torch.float64),
        )
    }
    decoded = {
        "fast": decode(fast, eager_tokens),
        "eager": decode(eager, eager_tokens),
        "ref": decode(double, replace(eager_tokens, dtype=torch.float64)),
    }
    result: dict[str, Any] = {"latent": _measured(latents), "video": _measured(decoded)}
    if eager_tokens.indices is not None:
        tokens = parity.tokens(latents["fast"], latents["eager"], latents["ref"], fast.config.levels)
        equal = int((eager_tokens.indices == fast_tokens.indices).sum())
        result["tokens"] = {
            "equal": equal,
            "total": eager_tokens.indices.numel(),
            "text": str(tokens),
            "ok": tokens.ok,
            "unexplained": tokens.unexplained,
            "flips": tokens.flips,
            "eager_flips": tokens.eager_flips,
            "latent_error": tokens.latent_error,
        }
    result["ok"] = all(part["ok"] for part in result.values())
    return result


def _measured(values: dict[str, Tensor]) -> dict[str, Any]:
    close = parity.close(values["fast"], values["ref"], values["eager"])
    return {
        "ok": close.ok,
        "error": close.error,
        "bound": close.bound,
        "region": close.region,
        "eager_error": ((values["eager"] - values["ref"]).norm() / values["ref"].norm()).item(),
    }


def time_both(
    eager: VidTok, fast: VidTok, clips: Tensor, tokens: Tokens, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds over rounds in which the variants take turns, and the median of the ratios within a
    round."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": []} for name in ("eager", "fast")
    }
    for _ in range(rounds):
        for name, model in (("eager", eager), ("fast", fast)):
            start = time.perf_counter()
            encode(model, clips)
            middle = time.perf_counter()
            decode(model, tokens)
            times[name]["encode"].append(middle - start)
            times[name]["decode"].append(time.perf_counter() - middle)
    for part in times.values():
        part["total"] = [a + b for a, b in zip(part["encode"], part["decode"], strict=True)]
    result = {
        name: {what: statistics.median(values) for what, values in part.items()}
        for name, part in times.items()
    }
    result["ratio"] = {
        what: statistics.median(a / b for a, b in zip(times["eager"][what], times["fast"][what], strict=True))
        for what in ("encode", "decode", "total")
    }
    return result


def measure_memory(model: VidTok, shape: tuple[int, int, int]) -> dict[str, int] | None:
    """Per variant the peak bytes of one chunk beyond the loaded model; None where the system cannot tell (no
    Linux)."""
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.safetensors")
        model.save(file)
        config = model.config.to_dict()
        return {
            variant: process_memory.measure(
                variant, shape, config=config, checkpoint=file, threads=torch.get_num_threads()
            )["peak"]
            for variant in process_memory.VARIANTS
        }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Time: how many times faster. Memory: which part of eager's."""
    memory = result["peak_bytes"]
    ratio = {f"time_{what}": value for what, value in result["seconds"]["ratio"].items()}
    if memory:
        ratio["memory"] = memory["fast"] / memory["eager"]
        ratio["memory_without_weight_cache"] = memory["fast without weight cache"] / memory["eager"]
    return ratio


def _parity_lines(measured: dict[str, Any]) -> str:
    lines = [f"Tokens: {measured['tokens']['text']}"] if "tokens" in measured else []
    for name in ("latent", "video"):
        part = measured[name]
        lines.append(
            f"{name.capitalize()} against float64: error {part['error']:.1e}, PyTorch's own "
            f"{part['eager_error']:.1e}, "
            f"allowed {part['bound']:.1e} ({part['region']}): {'within' if part['ok'] else 'TOO FAR'}"
        )
    return "\n".join(lines)


def _cost_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("", "PyTorch", "vtok-fast", "ratio", title="Cost", title_justify="left")
    seconds = result["seconds"]
    for what in ("encode", "decode", "total"):
        table.add_row(
            f"{what}, s",
            f"{seconds['eager'][what]:.3f}",
            f"{seconds['fast'][what]:.3f}",
            f"{seconds['ratio'][what]:.2f}x faster",
        )
    if memory := result["peak_bytes"]:
        for what, name in (
            ("peak memory, MB", "fast"),
            ("  without weight cache", "fast without weight cache"),
        ):
            table.add_row(
                what,
                f"{memory['eager'] / 1e6:.0f}",
                f"{memory[name] / 1e6:.0f}",
                f"{memory[name] / memory['eager']:.2f} of it",
            )
    table.add_row("PSNR, dB", f"{result['eager_psnr_db']:.2f}", f"{result['psnr_db']:.2f}", "")
    return table
