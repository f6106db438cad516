"""Video files to token files and back, window by window: any length in bounded memory, and a run that was
stopped goes on.

The video is read as a player shows it (docs/videos.md), and each frame's own time is kept.

A window is what the model's `window` says: 17 frames, or 16 of a model that is not causal; InfoTok 81 that
share 3 with the window before; ProMAG its chunk and overlap; TivTok eight chunks, which share their invariant
tokens. Every window is tokenized on its own, the frames that two share are blended when they are decoded, as
`stream` of the model does (but VidTok's, which is one pass over the whole). The last window may be shorter;
where a model needs 1 + k * factor frames, copies of the last one fill it up and come off again at the end.

What is done lies in `OUTPUT.parts/` until the output is complete; the same call with the same input, model
and choices continues from there, another one starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtok_fast import models
from vtok_fast.commands.resumable import Parts
from vtok_fast.io.files import check_distinct, raw, write_atomically
from vtok_fast.io.token_windows import TokenWindows, part_info, write_windows
from vtok_fast.io.video import (
    Reading,
    Times,
    VideoError,
    Window,
    join_videos,
    open_video,
    to_float,
    write_video,
)
from vtok_fast.io.video.geometry import fit
from vtok_fast.io.video.writer import writable
from vtok_fast.models.common.windows import WindowStream

Progress = Callable[[int, int | None], None]  # windows done, windows in all if that is known
PACKAGED = {
    "vidtok/tiny": Path(__file__).resolve().parents[1] / "models" / "weights" / "vidtok_tiny.safetensors"
}
READING = tuple(field.name for field in fields(Reading))
CHOICES = ("rate", "rate_strategy", "router", "elbo_mean")  # how InfoTok keeps tokens


def systems() -> dict[str, type[nn.Module]]:
    """The tokenizers by the first part of their models' names."""
    kinds = (getattr(models, name) for name in models.__all__)
    return {kind.system: kind for kind in kinds if hasattr(kind, "from_checkpoint")}


def load_model(
    name: str, checkpoint: str | os.PathLike | None = None, config: dict[str, Any] | None = None
) -> nn.Module:
    """The model called `name`, as in "vidtok/fsq_causal_488_32768", in evaluation mode.

    Args:
        checkpoint: its weights; may be left out for the models whose weights the package has ("vidtok/tiny").
        config: the configuration, where it is not the one that `name` names.

    Raises ValueError for an unknown name or without weights; else what the model's `from_checkpoint` raises.
    """
    system, _, configuration = name.partition("/")
    if system not in systems():
        raise ValueError(
            f"model={name!r}: the tokenizers are {', '.join(sorted(systems()))}; give one as in vidtok/tiny"
        )
    if checkpoint is None and name not in PACKAGED:
        raise ValueError(
            f"checkpoint: {name} needs one; the package has weights of {', '.join(PACKAGED)} alone"
        )
    chosen = config if config is not None else configuration or None
    return (
        systems()[system].from_checkpoint(PACKAGED[name] if checkpoint is None else checkpoint, chosen).eval()
    )


def tokenize(
    video: str | os.PathLike,
    output: str | os.PathLike,
    model: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    window: int | None = None,
    overlap: int | None = None,
    weights: str | None = None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> TokenWindows:
    """Write the tokens of a video file to `output`, and return them.

    Args:
        size: as for `read_video`; then the frame is cut to what the model divides evenly.
        window, overlap: frames per window, 1 + k * factor of a causal model, k * factor of another one; and
            how many of them two windows share. None: the model's own; with another window, its overlap where
            the window is longer than that.
        weights: the `fingerprint` to note in the file, of a model that was converted to another dtype since
            it was loaded. None: of the model as it is.
        options: how the video is read, the fields of `vtok_fast.io.video.Reading`: fps, deinterlace, hdr,
            background, on_error, stream. And of a model that chooses its tokens (InfoTok): rate,
            rate_strategy, router as in its configuration, which holds otherwise, and elbo_mean. The
            strategies "global_elbo" and "bin" compare a window with elbo_mean, a mean score (see
            `InfoTok.mean_score`); without one, the mean over this video's windows, for which it is read
            twice.

    Raises:
        FileNotFoundError, VideoError: the video. OSError: the output cannot be written, or another run is
            writing it.
        ValueError: size, window, overlap or an option does not suit the model; the output is the video; or
            the folder of parts is somebody else's.
    """
    video, output = Path(video), Path(output)
    reading = {name: options.pop(name) for name in READING if name in options}
    window, overlap = _window(model, window, overlap)
    choice = _choice(model, options)
    weights = weights or fingerprint(model)
    check_distinct(output, video=video)
    with open_video(video, **reading) as source:
        return _tokenize(source, output, model, size, window, overlap, weights, progress, choice)


def _tokenize(
    source: open_video,
    output: Path,
    model: nn.Module,
    size: int | tuple[int, int] | None,
    window: int,
    overlap: int,
    weights: str,
    progress: Progress,
    choice: dict[str, Any],
) -> TokenWindows:
    """`tokenize` of a video that is open, with everything chosen."""
    video, count, how = source.path, source.count, _noted(source.reading)
    height, width = _frame(source.height, source.width, size, model.config.spatial_factor)
    job = Parts(
        output,
        {
            "video": str(video.resolve()),
            "bytes": video.stat().st_size,
            "modified": video.stat().st_mtime,
            "reading": how,
            "times": True,
            "window": window,
            "overlap": overlap,
            "size": [height, width],
            "model": _description(model, weights),
            **choice,
        },
    )
    passes = 1
    total = 1 - min(window - count, 0) // (window - overlap) if count else None

    def each(suffix: str, make: Callable[[Tensor, Window, Path], None]) -> list[Path]:
        """Let make(window (1, C, T, H, W), its frames, part) write each part that is not there. Returns the
        parts."""
        first = 0
        while job.part(first, suffix).is_file():
            first += 1
        # What follows the parts that are there is read from the one before it, which may be the last.
        first = max(first - 1, 0)
        parts = [job.part(index, suffix) for index in range(first)]
        windows = source.windows(
            window, size, overlap, first=first, wanted=lambda index: not job.part(index, suffix).is_file()
        )
        with contextlib.closing(windows):
            for index, frames in enumerate(windows, first):
                parts.append(job.part(index, suffix))
                if not parts[-1].is_file():
                    made = _filled(to_float(center(frames.read(), height, width)), model)
                    parameter = next(model.parameters())
                    make(made.to(parameter.device, parameter.dtype)[None], frames, parts[-1])
                progress(done + len(parts), total and passes * total)
        if not parts:
            raise VideoError(f"path: {video} has no frames")
        return parts

    def score(x: Tensor, frames: Window, part: Path) -> None:
        mean = model.scores(x, choice.get("router")).double().mean().item()
        job.start()
        write_atomically(part, lambda temporary: Path(temporary).write_text(json.dumps(mean)))

    def encode(x: Tensor, frames: Window, part: Path) -> None:
        tokens = model.encode(x, **choice)
        job.start()
        problems = [problem.to_json() for problem in frames.problems]
        replace(tokens, info={"times": frames.times.to_json(), "problems": problems}).save(part)

    with job:
        done = 0
        strategy = choice.get("rate_strategy", getattr(model.config, "rate_strategy", None))
        if strategy in ("global_elbo", "bin") and "elbo_mean" not in choice:
            passes = 2
            means = [json.loads(part.read_text()) for part in each("json", score)]
            choice["elbo_mean"], done = sum(means) / len(means), len(means)
        parts = each("safetensors", encode)
        facts = {**_frames(parts, overlap), **how}
        facts |= {"window": window, "overlap": overlap, "weights": weights, **choice}
        write_windows(output, parts, facts)
        job.finish()
    return TokenWindows(output)


def detokenize(
    tokens: str | os.PathLike,
    output: str | os.PathLike,
    model: nn.Module,
    *,
    weights: str | None = None,
    any_weights: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the video (MP4, H.264) of what `tokenize` wrote, each frame at its own time.

    Args:
        weights: the `fingerprint` of a model that was converted to another dtype since it was loaded. None:
            of the model as it is.
        any_weights: decode tokens of other weights too, as with a decoder that was fine-tuned after they were
            made.

    Raises:
        FileNotFoundError: there are no such tokens.
        ValueError: the file is damaged, comes from another model or other weights, or has an odd height or
            width, which H.264 does not allow; the output is the file of tokens; or the parts folder
            belongs to another run.
        OSError: the output cannot be written, or another run is writing it.
    """
    path, output = Path(tokens), Path(output)
    windows = TokenWindows(path)
    length, height, width = windows[0].video_shape
    if height % 2 or width % 2:
        raise ValueError(f"tokens: frames of {height}x{width}; H.264 needs an even height and width")
    check_distinct(output, tokens=path)
    model.check_tokens(windows[0])
    weights, made_by = weights or fingerprint(model), windows.info.get("weights")
    if made_by not in (None, weights) and not any_weights:
        raise ValueError(
            f"tokens: made by other weights of {windows.model} ({str(made_by)[:12]}) than these "
            f"({weights[:12]}); "
            "give the checkpoint that made them, or any_weights (--any-weights) if only the decoder changed"
        )
    overlap = windows.info.get("overlap", 0) if len(windows) > 1 else 0
    step = length - overlap
    frames = windows.info.get("frames", step * (len(windows) - 1) + windows[-1].video_shape[0])
    times = writable(windows.times or Times.constant(windows.info.get("fps", 25.0), frames))
    if len(times) != frames:
        raise ValueError(f"tokens: of {frames} frames, with the times of {len(times)}")
    job = Parts(output, {"tokens": _digest(path), "times": True, "model": _description(model, weights)})
    parameter = next(model.parameters())
    stream = WindowStream(model, _whole(length, model), overlap)
    decoded = -1

    def decode(index: int) -> Tensor:
        current = windows[index].to(parameter.device)
        video = stream.decode_chunk(current, lookahead=current if index + 1 < len(windows) else None)
        if video.shape[2] != (wanted := current.video_shape[0] - overlap * (index + 1 < len(windows))):
            raise ValueError(
                f"tokens: {wanted} frames of a window, of which {windows.model} gives back {video.shape[2]}"
            )
        return video[0]

    with job:
        for index in range(len(windows)):
            part = job.part(index, "mp4")
            if not part.is_file():
                if index > decoded + 1:  # a run goes on: the windows that this one shares frames with
                    stream.reset()
                    for earlier in range(max(index - -(-overlap // step), 0), index):
                        decode(earlier)
                video = decode(index)[:, : frames - index * step].float()
                decoded = index
                job.start()
                write_video(
                    part, video, times=times[index * step : index * step + video.shape[1]].from_zero()
                )
            progress(index + 1, len(windows))
        parts = [job.part(index, "mp4") for index in range(len(windows))]
        join_videos(output, parts, start=max(0, times.pts[0]) * times.base)
        job.finish()


def _noted(reading: Reading) -> dict[str, Any]:
    """What a file of tokens says of how the video was read, where that was asked for."""
    attributes = {"fps": "rate", "deinterlace": "deinterlacer"}
    noted = {}
    for name in READING:
        value, usual = (getattr(one, attributes.get(name, name)) for one in (reading, Reading()))
        if value != usual:
            noted[name] = str(value) if name == "fps" else value
    return {"reading": noted} if noted else {}


def reading_of(info: dict[str, Any]) -> dict[str, Any]:
    """How the video was read, as a file of tokens notes it, in the words of `Reading`."""
    noted = dict(info.get("reading", {}))
    if "fps" in noted:
        noted["fps"] = Fraction(noted["fps"])
    if "background" in noted:
        noted["background"] = tuple(noted["background"])
    return noted


def _frames(parts: list[Path], overlap: int) -> dict[str, Any]:
    """What the parts say of the video's frames: how many, when each is shown, what was left out or
    concealed."""
    infos = [part_info(part) for part in parts]
    windows = [Times.from_json(info["times"]) for info in infos]
    times = Times.cat([windows[0], *(window[overlap:] for window in windows[1:])])
    facts = {"fps": float(times.rate), "frames": len(times), "times": times.to_json()}
    problems = [problem for info in infos for problem in info["problems"]]
    for done in ("left out", "concealed"):
        listed = [{k: v for k, v in one.items() if k != "done"} for one in problems if one["done"] == done]
        if listed:
            facts[done.replace(" ", "_")] = listed
    return facts


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights, the same on every device and for an accelerated model; of another dtype
    it is another one."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value.detach().cpu().contiguous()))
    return digest.hexdigest()


def _description(model: nn.Module, weights: str) -> dict[str, Any]:
    """What makes a part of one run unfit for another."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"system": model.system, "config": model.config.to_dict(), "weights": weights, "dtype": dtype}


def _window(model: nn.Module, window: int | None, overlap: int | None) -> tuple[int, int]:
    """Frames of a window, and how many of them it shares with the next one."""
    own, shared = model.window
    window = own if window is None else window
    factor = model.config.time_downsample_factor
    if window < 1 or (window - model.config.causal) % factor:
        raise ValueError(
            f"window={window}: must be {'1 + ' if model.config.causal else ''}a multiple of {factor} frames"
        )
    if overlap is None:
        overlap = shared if shared < window else 0
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap}: must be at least 0 and less than window={window}")
    return window, overlap


def _choice(model: nn.Module, choice: dict[str, Any]) -> dict[str, Any]:
    """The choices that were made. Raises ValueError for a model that has none, or for one that does not
    exist."""
    made, config = (
        {name: value for name, value in choice.items() if value is not None},
        cast(Any, model.config),
    )
    for name, value in made.items():
        if name not in CHOICES:
            raise ValueError(f"{name}={value!r}: the choices are {', '.join(CHOICES)}")
        if not hasattr(config, "rate"):
            raise ValueError(
                f"{name}={value!r}: {model.system} models keep all tokens, only infotok's choose"
            )
        if name in ("rate", "router", "rate_strategy"):
            replace(config, **{name: value})  # it knows the values
    return made


def _filled(video: Tensor, model: nn.Module) -> Tensor:
    """A window (C, T, H, W) with copies of the last frame appended, up to a number of frames that comes back
    complete."""
    missing = _whole(video.shape[1], model) - video.shape[1]
    return torch.cat((video, video[:, -1:].expand(-1, missing, -1, -1)), 1) if missing else video


def _whole(frames: int, model: nn.Module) -> int:
    """The next number of frames that comes back complete."""
    return frames + (model.config.causal - frames) % model.config.time_downsample_factor


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _frame(height: int, width: int, size: int | tuple[int, int] | None, factor: int) -> tuple[int, int]:
    """What is left of a frame that is scaled to `size` and cut to a multiple of the model's spatial
    factor."""
    if isinstance(size, int):
        height, width = fit(height, width, size)
    elif size is not None:
        height, width = size
        if height % factor or width % factor:
            raise ValueError(f"size={height}x{width}: height and width must be multiples of {factor}")
    cut = height // factor * factor, width // factor * factor
    if min(cut) == 0:
        raise ValueError(
            f"size: frames of {height}x{width} are smaller than one token of {factor}x{factor} pixels"
        )
    return cut


def center(video: Tensor, height: int, width: int) -> Tensor:
    """The middle of the frames of a video (C, T, H, W)."""
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width]
