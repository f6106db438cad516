"""Video files to token files, window by window: any length in bounded memory, and a run that was stopped
goes on.

The video is read as a player shows it, and each frame's own time is kept.

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
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vtok_fast.commands.load_model import description, fingerprint
from vtok_fast.commands.model_frames import center, filled, frame_size, window_of
from vtok_fast.commands.resumable import Parts, Progress
from vtok_fast.io.files import write_atomically
from vtok_fast.io.paths import check_distinct
from vtok_fast.io.token_windows import TokenWindows, part_info, write_windows
from vtok_fast.io.video import (
    Reading,
    Times,
    VideoError,
    Window,
    open_video,
    to_float,
)

READING = tuple(field.name for field in fields(Reading))
CHOICES = ("rate", "rate_strategy", "router", "elbo_mean")  # how InfoTok keeps tokens


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
    window, overlap = window_of(model, window, overlap)
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
    height, width = frame_size(source.height, source.width, size, model.config.spatial_factor)
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
            "model": description(model, weights),
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
                    made = filled(to_float(center(frames.read(), height, width)), model)
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
