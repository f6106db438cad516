"""Token files to video files, window by window: in bounded memory, and a run that was stopped goes on, as
that of `vtok_fast.commands.tokenize`."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from vtok_fast.commands.load_model import description, fingerprint
from vtok_fast.commands.model_frames import whole
from vtok_fast.commands.resumable import Parts, Progress
from vtok_fast.io.files import digest_of
from vtok_fast.io.paths import check_distinct
from vtok_fast.io.token_windows import TokenWindows
from vtok_fast.io.video import Times, join_videos, write_video
from vtok_fast.io.video.writer import writable
from vtok_fast.models.common.windows import WindowStream


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
    job = Parts(output, {"tokens": digest_of(path), "times": True, "model": description(model, weights)})
    parameter = next(model.parameters())
    stream = WindowStream(model, whole(length, model), overlap)
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
