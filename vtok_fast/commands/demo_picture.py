"""The one picture of the demo: what went in, what came back, the difference, and what it cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_fast.io.files import write_atomically
from vtok_fast.io.video import to_uint8

INK, FAINT, PLAIN, FAST = "#1d232b", "#7b8794", "#b9c2cc", "#1f6feb"
COLUMNS = 6
GAIN = 4  # of the difference, so that it can be seen


def draw(path: str | os.PathLike, clips: Tensor, reconstruction: Tensor, result: dict[str, Any]) -> None:
    """Write a PNG.

    Args:
        clips, reconstruction: (B, 3, T, H, W) in [-1, 1].
        result: as `demo.run` makes it.

    Raises ImportError without matplotlib, OSError if the file cannot be written.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["Inter", "Helvetica Neue", "DejaVu Sans"],
            "text.color": INK,
            "axes.edgecolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(12.6, 9.2), facecolor="white")
        _header(figure, result)
        _frames(figure, clips, reconstruction)
        _costs(figure, result)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=140))


def need_matplotlib() -> None:
    """Raises ImportError without it, saying how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'drawing the picture needs matplotlib ({error}): pip install "vtok-fast[demo]"'
        ) from error


def _header(figure: Any, result: dict[str, Any]) -> None:
    count, _, frames, height, width = result["shape"]
    packed = result["compression"]
    figure.text(
        0.04,
        0.955,
        f"{count * frames} frames as {packed['tokens']:,} tokens, and back",
        size=23,
        weight="bold",
        va="center",
    )
    weights = "" if result["trained"] else "   ·   RANDOM WEIGHTS: the picture is noise"
    figure.text(
        0.04,
        0.912,
        f"{Path(result['video']).name}, {height}×{width}   ·   VidTok {result['model']}, "
        f"{result['parameters'] / 1e6:.2g} M parameters   ·   {_bytes(packed['video_bytes'])} → "
        f"{_bytes(packed['token_bytes'])}, {packed['ratio']:.0f} times smaller   ·   "
        f"PSNR {result['psnr_db']:.1f} dB{weights}",
        size=11,
        color=FAINT,
        va="center",
    )


def _frames(figure: Any, clips: Tensor, reconstruction: Tensor) -> None:
    # (frames, 3, H, W)
    source, back = (video.transpose(1, 2).flatten(0, 1).clamp(-1, 1) for video in (clips, reconstruction))
    total = source.shape[0]
    shown = sorted({round(i * (total - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    rows = (
        ("input", to_uint8(source)),
        ("reconstruction", to_uint8(back)),
        (f"difference × {GAIN}", to_uint8((back - source).abs().mul(GAIN) - 1)),
    )
    height, width = source.shape[-2:]
    left, right, top, gap = 0.135, 0.96, 0.875, 0.006
    cell = (right - left - gap * (COLUMNS - 1)) / COLUMNS
    tall = min(cell * 12.6 / 9.2 * height / width, 0.19)
    for r, (name, images) in enumerate(rows):
        bottom = top - (r + 1) * tall - r * gap * 1.37
        figure.text(left - 0.012, bottom + tall / 2, name, size=11, ha="right", va="center")
        for c, frame in enumerate(shown):
            axes = figure.add_axes((left + c * (cell + gap), bottom, cell, tall))
            axes.imshow(images[frame].permute(1, 2, 0).numpy(), interpolation="lanczos")
            axes.set_axis_off()
            if r == 0:
                figure.text(
                    left + c * (cell + gap) + cell / 2,
                    top + 0.006,
                    f"frame {frame + 1}",
                    size=9,
                    color=FAINT,
                    ha="center",
                )


def _costs(figure: Any, result: dict[str, Any]) -> None:
    seconds, memory, ratio = result["seconds"], result["peak_bytes"], result["ratios"]
    axes = figure.add_axes((0.135, 0.085, 0.375, 0.145))
    names = (("PyTorch", "eager", PLAIN), ("vtok-fast", "fast", FAST))
    longest = max(seconds[key]["total"] for _, key, _ in names)
    for row, (_, key, color) in enumerate(names):
        part = seconds[key]
        axes.barh(row, part["encode"], 0.62, color=color)
        axes.barh(
            row,
            part["decode"],
            0.62,
            left=part["encode"],
            color=color,
            alpha=0.72,
            edgecolor="white",
            linewidth=1.2,
        )
        axes.text(part["total"] + longest * 0.02, row, f"{part['total']:.2f} s", va="center", size=11)
        for what, middle in (("encode", part["encode"] / 2), ("decode", part["encode"] + part["decode"] / 2)):
            if part[what] > 0.13 * longest:
                axes.text(
                    middle,
                    row,
                    what,
                    ha="center",
                    va="center",
                    size=9,
                    color="white" if key == "fast" else INK,
                )
    speed = ratio["time_total"]
    _finish(
        axes,
        [n for n, _, _ in names],
        longest,
        "time",
        f"{speed:.2f} times faster" if speed >= 1 else f"{1 / speed:.2f} times slower",
    )
    if memory is not None:
        _memory(figure, memory, ratio["memory"])
    parity = result["parity"]
    said = (
        f"{parity['tokens']['equal']:,} of {parity['tokens']['total']:,} tokens equal   ·   "
        if "tokens" in parity
        else ""
    )
    figure.text(
        0.04,
        0.028,
        f"{said}decoded video within {parity['video']['error']:.1e} of float64 (PyTorch's own: "
        f"{parity['video']['eager_error']:.1e})   ·   {result['threads']} threads, torch {result['torch']}",
        size=9.5,
        color=FAINT,
    )


def _memory(figure: Any, memory: dict[str, int], ratio: float) -> None:
    axes = figure.add_axes((0.635, 0.085, 0.325, 0.145))
    bars = (
        ("PyTorch", "eager", PLAIN),
        ("vtok-fast", "fast", FAST),
        ("without cache", "fast without weight cache", FAST),
    )
    longest = max(memory.values())
    for row, (_, key, color) in enumerate(bars):
        axes.barh(row, memory[key], 0.62, color=color, alpha=1.0 if row < 2 else 0.72)
        axes.text(memory[key] + longest * 0.02, row, _bytes(memory[key]), va="center", size=11)
    _finish(axes, [n for n, _, _ in bars], longest, "peak memory, one chunk", f"{ratio:.2f} of PyTorch's")


def _finish(axes: Any, names: list[str], longest: float, what: str, headline: str) -> None:
    axes.set(yticks=range(len(names)), xlim=(0, longest * 1.22), ylim=(len(names) - 0.5, -0.5))
    axes.set_yticklabels(names, size=11)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.text(0, 1.08, headline, transform=axes.transAxes, size=15, weight="bold")
    axes.text(1, 1.08, what, transform=axes.transAxes, size=10, color=FAINT, ha="right")


def _bytes(count: float) -> str:
    unit, *larger = ("B", "kB", "MB", "GB")
    while larger and count >= 1000:
        count, unit, *larger = (count / 1000, *larger)
    return f"{count:.3g} {unit}" if count < 100 else f"{count:,.0f} {unit}"
