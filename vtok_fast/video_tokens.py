"""Video files to token files and back, window by window: any length in bounded memory, and a run that was stopped goes on.

Every window is tokenised on its own, as the tokenizers are trained and measured (17 frames, or 16 of a model that is not causal).
The last one is filled up with copies of the last frame, which come off again at the end. What is done lies in `OUTPUT.parts/` until
the output is complete; the same call with the same input, model and sizes continues from there, another one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast import models
from vtok_fast.tokens import Tokens, write_atomically
from vtok_fast.video import VideoError, join_videos, open_video, to_float, write_video

Progress = Callable[[int, int | None], None]  # windows done, windows in all if that is known
PACKAGED = {"vidtok/tiny": Path(__file__).parent / "models" / "weights" / "vidtok_tiny.safetensors"}


def systems() -> dict[str, type[nn.Module]]:
    """The tokenizers by the first part of their models' names."""
    kinds = (getattr(models, name) for name in models.__all__)
    return {kind.system: kind for kind in kinds if hasattr(kind, "from_checkpoint")}


def load_model(name: str, checkpoint: str | os.PathLike | None = None, config: dict[str, Any] | None = None) -> nn.Module:
    """The model called `name`, as in "vidtok/fsq_causal_488_32768", in evaluation mode.

    Args:
        checkpoint: its weights; may be left out for the models whose weights the package has ("vidtok/tiny").
        config: the configuration, where it is not the one that `name` names.

    Raises ValueError for an unknown name or without weights; else what the model's `from_checkpoint` raises.
    """
    system, _, configuration = name.partition("/")
    if system not in systems():
        raise ValueError(f"model={name!r}: the tokenizers are {', '.join(sorted(systems()))}; give one as in vidtok/tiny")
    if checkpoint is None and name not in PACKAGED:
        raise ValueError(f"checkpoint: {name} needs one; the package has weights of {', '.join(PACKAGED)} alone")
    chosen = config if config is not None else configuration or None
    return systems()[system].from_checkpoint(PACKAGED[name] if checkpoint is None else checkpoint, chosen).eval()


def tokenize(video: str | os.PathLike, output: str | os.PathLike, model: nn.Module, *, size: int | tuple[int, int] | None = None,
             window: int | None = None, rate: float | None = None, progress: Progress = lambda done, total: None) -> Tokens:
    """Write the tokens of a video file to `output`, and return them: a batch of windows.

    Args:
        size: as for `read_video`; then the frame is cut to what the model divides evenly.
        window: frames per window, 1 + k * factor of a causal model, k * factor of another one.
        rate: share of the tokens to keep, of a model that chooses them (InfoTok); None: as it is configured.

    Raises:
        FileNotFoundError, VideoError: the video. OSError: the output cannot be written.
        ValueError: size, window or rate does not suit the model.
    """
    video, output = Path(video), Path(output)
    window = window or getattr(model, "window", 16 + model.config.causal)
    factor = model.config.time_downsample_factor
    if window < 1 or (window - model.config.causal) % factor:
        raise ValueError(f"window={window}: must be {'1 + ' if model.config.causal else ''}a multiple of {factor} frames")
    if rate is not None and not hasattr(model.config, "rate"):
        raise ValueError(f"rate={rate}: {model.system} models keep all tokens, only infotok's choose")
    choice = {} if rate is None else {"rate": rate}
    parameter = next(model.parameters())
    with open_video(video) as source:
        height, width = _frame(source.height, source.width, size, model.config.spatial_factor)
        job = _Job(output, {"video": str(video.resolve()), "bytes": video.stat().st_size, "modified": video.stat().st_mtime,
                            "window": window, "size": [height, width], "weights": fingerprint(model), **choice})
        total, frames = -(-source.count // window) if source.count else None, 0
        for index, (count, read) in enumerate(source.windows(window, size)):
            part = job.part(index, "safetensors")
            frames += count
            if not part.is_file():
                x = to_float(centre(read(), height, width)).to(parameter.device, parameter.dtype)
                x = torch.cat((x, x[:, -1:].expand(-1, window - x.shape[1], -1, -1)), 1)
                encoded = model.encode(x[None], **choice)
                job.start()
                encoded.save(part)
            progress(index + 1, total)
        fps = source.fps
    if not frames:
        raise VideoError(f"path: {video} has no frames")
    parts = [Tokens.load(job.part(index, "safetensors")) for index in range(-(-frames // window))]
    tokens = replace(Tokens.stack(parts), info={"fps": fps, "frames": frames})
    tokens.save(output)
    job.finish()
    return tokens


def detokenize(tokens: str | os.PathLike, output: str | os.PathLike, model: nn.Module,
               *, progress: Progress = lambda done, total: None) -> None:
    """Write the video (MP4, H.264) of what `tokenize` wrote.

    Raises:
        FileNotFoundError: there are no such tokens.
        ValueError: the file is damaged, comes from another model, or has an odd height or width, which H.264 has not.
        OSError: the output cannot be written.
    """
    path, output = Path(tokens), Path(output)
    loaded = Tokens.load(path)
    if any(n % 2 for n in loaded.video_shape[1:]):
        raise ValueError(f"tokens: frames of {loaded.video_shape[1]}x{loaded.video_shape[2]}; H.264 needs an even height and width")
    window = loaded.video_shape[0]
    frames, fps = loaded.info.get("frames", window * loaded.batch), loaded.info.get("fps", 25.0)
    job = _Job(output, {"tokens": hashlib.sha256(path.read_bytes()).hexdigest(), "weights": fingerprint(model)})
    parameter = next(model.parameters())
    for index in range(loaded.batch):
        part = job.part(index, "mp4")
        if not part.is_file():
            video: Tensor = model.decode(loaded.clip(index).to(parameter.device))[0]
            if video.shape[1] != window:
                raise ValueError(f"tokens: {window} frames per window, of which {loaded.model} gives back {video.shape[1]}")
            job.start()
            write_video(part, video[:, : frames - index * window].float(), fps)
        progress(index + 1, loaded.batch)
    join_videos(output, [job.part(index, "mp4") for index in range(loaded.batch)])
    job.finish()


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's configuration and weights: the same for an accelerated one."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


class _Job:
    """The folder of what is done, and what it was done for."""

    def __init__(self, output: Path, description: dict[str, Any]):
        self.folder, self.description = output.with_name(output.name + ".parts"), description
        file = self.folder / "job.json"
        if self.folder.is_dir() and not (file.is_file() and json.loads(file.read_text()) == description):
            self.finish()  # of another job

    def start(self) -> None:
        """Make the folder, once there is something to put in."""
        if self.folder.is_dir():
            return
        try:
            self.folder.mkdir()
            text = json.dumps(self.description, indent=2)
            write_atomically(self.folder / "job.json", lambda temporary: Path(temporary).write_text(text))
        except OSError as error:
            raise OSError(error.errno, f"output: cannot write {self.folder}: {error.strerror or error}") from error

    def part(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:06d}.{suffix}"

    def finish(self) -> None:
        shutil.rmtree(self.folder)


def _frame(height: int, width: int, size: int | tuple[int, int] | None, factor: int) -> tuple[int, int]:
    """What is left of a frame that is scaled to `size` and cut to a multiple of the model's spatial factor."""
    if isinstance(size, int):
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
    elif size is not None:
        height, width = size
        if height % factor or width % factor:
            raise ValueError(f"size={height}x{width}: height and width must be multiples of {factor}")
    cut = height // factor * factor, width // factor * factor
    if min(cut) == 0:
        raise ValueError(f"size: frames of {height}x{width} are smaller than one token of {factor}x{factor} pixels")
    return cut


def centre(video: Tensor, height: int, width: int) -> Tensor:
    """The middle of the frames of a video (C, T, H, W)."""
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width]
