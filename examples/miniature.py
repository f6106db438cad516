"""What the miniatures of the papers' claims share: clips, a short training, scores, a section of
docs/results.md with its picture.

Everything is small on purpose, so that each claim is tried in some minutes on one core. Steps and seeds are
fixed, the clips are those of `vtok_fast.commands.clips`; with the same versions on the same processor the
numbers come out the same.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from train import reconstruction_error, smoothed  # this and the next lie beside this file
from training_data import Clips

from vtok_fast import metrics
from vtok_fast.io.files import write_atomically
from vtok_fast.io.video import read_video

ROOT = Path(__file__).resolve().parents[1]
HOLD_OUT = ("bikes.mp4", 0, 137)  # scenes that occur nowhere else

CURVES: dict[str, list[float]] = {}  # of every training of this program, for docs/training.md

Loss = Callable[[nn.Module, Tensor, int], Tensor]


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data",
        help="folder of the demo's clips (vtok_fast.commands.clips)",
    )
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="where results.md and its pictures are"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times the steps of every training; published: 1"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    return options


def steps(options: argparse.Namespace, count: int) -> int:
    return max(1, round(options.scale * count))


def training_clips(options: argparse.Namespace, short_sides: tuple[int, ...] = (96, 128)) -> Clips:
    return Clips(options.data, HOLD_OUT, short_sides)


def held_out(options: argparse.Namespace, frames: int, size: int, clips: int = 6) -> Tensor:
    """(clips, 3, frames, size, size), evenly from the frames that no training sees: the center, at the clips'
    scale."""
    name, first, last = HOLD_OUT
    video = read_video(options.data / name, size=112, start=first, frames=last - first).video
    top, left = (video.shape[2] - size) // 2, (video.shape[3] - size) // 2
    starts = torch.linspace(0, video.shape[1] - frames, clips).long().tolist()
    return torch.stack([video[:, i : i + frames, top : top + size, left : left + size] for i in starts])


def plain_loss(aux: float = 0.0) -> Loss:
    """The reconstruction's error, and aux times the model's own loss."""

    def loss(model: nn.Module, x: Tensor, step: int) -> Tensor:
        result = model.reconstruct(x, step=step)
        return reconstruction_error(result.video, x) + aux * result.loss

    return loss


def train(
    model: nn.Module,
    clips: Clips,
    count: int,
    shape: tuple[int, int, int, int],
    *,
    lr: float,
    loss: Loss,
    seed: int = 0,
    bf16: bool = False,
    label: str = "",
) -> list[float]:
    """Train what in the model requires a gradient, with AdamW, warm-up and cosine; the losses. It is left in
    evaluation mode.

    With bf16, layers compute in bfloat16 (autocast), which convolutions gain by where the processor has the
    instructions.
    """
    torch.manual_seed(seed)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    warm = min(50, count // 5 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / count)))
        ),
    )
    model.train()
    losses = []
    for step in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, clips.sample(random.Random(f"{seed} {step}"), shape), step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if (step + 1) % max(1, count // 4) == 0:
            print(
                f"{label}: step {step + 1}/{count}, loss {sum(losses[-50:]) / len(losses[-50:]):.4f}",
                flush=True,
            )
    model.eval()
    CURVES[label] = losses
    return losses


@torch.inference_mode()
def psnr(reconstruct: Callable[[Tensor], Tensor], videos: Tensor) -> float:
    """Of reconstruct(video (1, 3, T, H, W)) over all the videos, in dB."""
    return metrics.psnr(torch.cat([reconstruct(video[None]) for video in videos]), videos)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; floats with two digits."""
    text = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *text))


def publish(options: argparse.Namespace, name: str, title: str, body: str, figure) -> None:
    """Replace this claim's section of docs/results.md, or add it, with its picture; likewise its trainings in
    docs/training.md."""
    _section(options.docs, "results", RESULTS, name, title, body, figure)
    curves, axes = new_figure()
    rows = []
    for label, losses in CURVES.items():
        at, means = smoothed(losses, 40)
        axes.plot(at, means, label=label)
        rows.append((label, len(losses), f"{means[0]:.3f}", f"{means[-1]:.3f}"))
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(fontsize="small")
    text = table(("training", "steps", "loss at first", "at last"), rows)
    _section(options.docs, "training", TRAINING, name, title.partition(":")[0], text, curves)


def _section(docs: Path, page_name: str, head: str, name: str, title: str, body: str, figure) -> None:
    page = docs / f"{page_name}.md"
    text = page.read_text() if page.is_file() else head
    picture = f"{page_name}_{name}.png"
    write_atomically(docs / picture, lambda temporary: figure.savefig(temporary, format="png", dpi=90))
    body += f"\n\n![{title}]({picture})"
    section = f"<!-- {name} -->\n## {title}\n\n{body}\n<!-- end of {name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}\n"
    write_atomically(page, lambda temporary: Path(temporary).write_text(text))
    print(section)


def bars(ax, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """Bars from zero, each with its value."""
    ax.bar_label(ax.bar(names, values, color="#4063d8"), fmt="%.4g", fontsize="small")
    ax.margins(y=0.1)
    ax.set_ylabel(label)


def new_figure(columns: int = 1):
    """A figure and its axes, without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns)


RESULTS = """# The papers' claims in miniature

Each section is written by the script that it names. The script trains tiny models on three short clips, for
some minutes on one core, and reports what it measured. Such models show whether a mechanism does what it is
for, not how good a full-size tokenizer is. PSNR is measured on frames that were not part of any training.
There is one seed of each: differences of a few tenths of a dB mean little.
"""

TRAINING = """# They learn

The loss of every training run behind [the miniatures](results.md): tiny configurations of the five systems
on the demo's clips, on one core, written by `python examples/miniature.py`, which runs the scripts of all
claims (one of them: `python examples/claims_tivtok.py`). The loss is the mean absolute error, plus twice
the mean squared error, a fifth of the error of differences between neighboring pixels, and the model's own
loss. `examples/train.py` is for longer training, with checkpoints and averaged weights:

```sh
python examples/train.py --model tivtok --data clips --minutes 60   # any of the systems, on a folder of clips
python examples/train.py --model vidtok --data clips --steps 50000 --losses paper
python examples/train.py --model vidtok --data clips --steps 30000 --losses paper --stage 2 \\
    --start data/run/model.safetensors --output data/stage2
python examples/train.py --model promag --data clips --steps 50000 --grow \\
    --start data/4x/model.safetensors --output data/8x
```

The second uses the weights of the paper's losses (`examples/recipes.py`), which include a perceptual
network (torchvision's VGG-16, whose weights must be present: nothing is downloaded) and a discriminator.
The third is VidTok's second stage: it trains only the decoder, on crops of twice the height and width. The
last grows a ProMAG by a stage.

TivTok and VTok did not learn at first: they converged to the mean color of a clip and stayed there. Learned
queries know nothing about places: attention is uniform, every token holds the mean of the clip, and the
decoder spreads it evenly. Now tokens stand at the centers of cells of the frame, and queries and keys start
with a bias that makes attention fall off with distance (`nearby` in their configurations).
"""


def main() -> int:
    """Every claim, one after the other; options are handed on."""
    import subprocess
    import sys

    for script in sorted(Path(__file__).parent.glob("claims_*.py")):
        if status := subprocess.run([sys.executable, script, *sys.argv[1:]]).returncode:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
