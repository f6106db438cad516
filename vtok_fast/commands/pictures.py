"""Pictures of what tokenizers and kernels do, for a gallery or a look at a model of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_fast.io.files import write_atomically
from vtok_fast.ops.scope_attention.scope import Scope


def error_map(path: str | os.PathLike, fast: Tensor, eager: Tensor, frames: int = 5) -> float:
    """Draws where two videos (B, C, T, H, W) differ, the first of the batch: the frames of one, and below
    each the largest difference over channels, amplified so that the largest of all is bright.

    Returns the amplification. Raises ValueError for videos of different shapes; ImportError without
    matplotlib.
    """
    if fast.shape != eager.shape or fast.dim() != 5:
        raise ValueError(f"fast: {tuple(fast.shape)}, eager: {tuple(eager.shape)}; expected one shape, 5D")
    difference = (fast[0].double() - eager[0].double()).abs().amax(0)
    gain = 1 / max(difference.max().item(), 1e-30)
    shown = _evenly(fast.shape[2], frames)
    figure, axes = _grid(2, len(shown), fast.shape[3] / fast.shape[4])
    for column, t in enumerate(shown):
        axes[0][column].imshow(_picture(fast[0, :, t]))
        axes[0][column].set_title(f"frame {t + 1}", size=9)
        axes[1][column].imshow((difference[t] * gain).float().numpy(), cmap="magma", vmin=0, vmax=1)
    rms = difference.square().mean().sqrt().item()
    title = f"difference × {gain:.1e}: largest {1 / gain:.1e}, root mean square {rms:.1e}, values in -1 to 1"
    figure.suptitle(title if gain < 1e29 else "equal to the bit", size=10)
    _save(figure, path)
    return gain


def token_map(
    path: str | os.PathLike, video: Tensor, keep: Tensor, scores: Tensor | None = None, frames: int = 6
) -> None:
    """Draws which tokens a router keeps: frames of a video (B, C, T, H, W), with the cells that are left out
    dark, and below the scores.

    Args:
        keep: bool (B, t, h, w). scores: (B, t, h, w), what it chose by.
    """
    steps = keep.shape[1]
    shown = _evenly(steps, frames)
    figure, axes = _grid(1 if scores is None else 2, len(shown), video.shape[3] / video.shape[4])
    for column, t in enumerate(shown):
        frame = min(video.shape[2] - 1, round((t + 0.5) * video.shape[2] / steps))
        mask = keep[0, t].float()[None, None]
        light = torch.nn.functional.interpolate(mask, size=tuple(video.shape[3:]))[0, 0]
        axes[0][column].imshow(_picture(video[0, :, frame]) * (0.2 + 0.8 * light[..., None].numpy()))
        axes[0][column].set_title(f"{int(keep[0, t].sum())} of {keep[0, t].numel()} kept", size=9)
        if scores is not None:
            most = scores[0].max().item()
            axes[1][column].imshow(scores[0, t].float().numpy(), cmap="magma", vmin=0, vmax=most)
    count, total = int(keep[0].sum()), keep[0].numel()
    figure.suptitle(f"{count} of {total} tokens kept, {100 * count / total:.0f} %", size=10)
    _save(figure, path)


def schedule(path: str | os.PathLike, scope: Scope) -> int:
    """Draws the dense calls that `scope_attention` makes of a scope on a CPU, each in a color of its own, and
    returns how many there are."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    from vtok_fast.ops.scope_attention.cpu import plan

    figure, ((axes,),) = _grid(1, 1, 0.8, 5)
    axes.set_axis_on()
    calls = [call for layer in plan(scope).layers for call in layer]
    for number, c in enumerate(calls):
        color = colormaps["tab20"](number % 20)
        for i in range(c.count):
            at = (c.k_start + i * c.k_step, c.q_start + i * c.q_step)
            axes.add_patch(Rectangle(at, c.keys, c.rows, facecolor=color, edgecolor="white", linewidth=0.5))
    axes.set(xlim=(0, scope.k_len), ylim=(scope.q_len, 0), xlabel="keys", ylabel="queries")
    axes.set_title(f"{len(calls)} dense calls, {100 * scope.density():.3g} % of the pairs", size=10)
    _save(figure, path)
    return len(calls)


def _evenly(length: int, count: int) -> list[int]:
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(min(count, length))})


def _grid(rows: int, columns: int, aspect: float, width: float = 2.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    size = (width * columns, width * aspect * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes


def _picture(frame: Tensor) -> Any:
    """(C, H, W) in -1 to 1 as (H, W, C) in 0 to 1."""
    return ((frame.float().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


def _save(figure: Any, path: str | os.PathLike) -> None:
    form = Path(path).suffix[1:] or "png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format=form))
