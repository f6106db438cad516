"""Long videos window by window: for models whose attention over time needs a whole clip at once, in the
memory of one window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.io.tokens import Tokens


def blend_weights(overlap: int, like: Tensor) -> Tensor:
    """Weights (overlap, 1, 1) of the earlier window in the frames that two windows share: (n - i)/(n + 1),
    falling linearly."""
    i = torch.arange(overlap, dtype=torch.float64, device=like.device)
    return ((overlap - i) / (overlap + 1)).to(like.dtype)[:, None, None]


class WindowStream:
    """Encode and decode a video in windows of `size` frames, each as a video of its own, that share `overlap`
    frames.

        stream = model.stream()
        for start, end in stream.chunks(num_frames):
            tokens.append(stream.encode_chunk(video[:, :, start:end]))
        for part, following in zip(tokens, [*tokens[1:], None]):
            frames = stream.decode_chunk(part, lookahead=following)

    The shared frames are mixed linearly. The result is not that of the whole video at once: a window does not
    see what came before it. Nothing is kept on the model; `decode_chunk` keeps the last frames of a window
    until the next one comes.
    """

    def __init__(self, model: Any, size: int, overlap: int = 0):
        factor, causal = model.config.time_downsample_factor, model.config.causal
        if size < 1 or (size - causal) % factor:
            raise ValueError(f"size={size}: a window has {'1 + ' if causal else ''}k * {factor} frames")
        if not 0 <= overlap < size:
            raise ValueError(f"overlap={overlap} must be at least 0 and less than size={size}")
        self.model, self.size, self.overlap = model, size, overlap
        self.reset()

    def reset(self) -> None:
        """Forget what came before: the next window is the first of a video."""
        self._held: Tensor | None = None

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """[start, end) of the windows of a video; each but the first starts `overlap` frames before the end
        of the one before it."""
        if frames < 1:
            raise ValueError(f"frames={frames}: a video has at least one")
        step, last = self.size - self.overlap, max(frames - self.overlap, 1)
        return [(start, min(start + self.size, frames)) for start in range(0, last, step)]

    def encode_chunk(self, video: Tensor, **options: Any) -> Tokens:
        """Tokens of one window of at most `size` frames. Errors and options as for the model's `encode`."""
        if isinstance(video, Tensor) and video.dim() == 5 and video.shape[2] > self.size:
            raise ValueError(f"video: a window has at most {self.size} frames, not {video.shape[2]}")
        return self.model.encode(video, **options)

    def decode_chunk(self, tokens: Tokens, *, lookahead: Tokens | None = None) -> Tensor:
        """The next frames: those of the window that no later one shares; at the end of the video, with no
        lookahead, all of them.

        Args:
            lookahead: the tokens of the next window, None at the end of the video; only whether there are any
                counts.

        Errors as for the model's `decode`; ValueError also for a batch or frame size that differs from the
        window before.
        """
        video = self.model.decode(tokens)
        if (
            self._held is not None
            and self._held.shape[:2] + self._held.shape[3:] != video.shape[:2] + video.shape[3:]
        ):
            raise ValueError(
                f"tokens: the window before was {tuple(self._held.shape)}, this one is {tuple(video.shape)} "
                "(B, C, T, H, W); reset() starts a new video"
            )
        if self._held is not None:
            n = min(self.overlap, video.shape[2])
            weight = blend_weights(self.overlap, video)[:n]
            mixed = weight * self._held[:, :, :n] + (1 - weight) * video[:, :, :n]
            video = torch.cat((mixed, video[:, :, n:]), dim=2)
        if lookahead is None or self.overlap == 0:
            self._held = None
            return video
        self._held = video[:, :, -self.overlap :].clone()  # a view would hold the whole window
        return video[:, :, : -self.overlap]
