"""Train a small tokenizer on a folder of clips.

    python -m vtok_fast.commands.clips data
    python examples/train.py --model vidtok --data data --hold-out bikes.mp4:0-137 --bf16 --threads 1
    --minutes 70

is how the weights of the package were made. The frames held out are other scenes of a clip whose second half
was trained on; `make demo` shows some of them.

AdamW with warm-up and cosine decay, gradient clipping, and an exponential moving average of the weights,
which is what is saved. The loss is the mean absolute error, plus the mean squared error, plus the error of
neighboring pixels' differences (sharp edges cost more than flat ones), plus --aux times the model's own loss
(of its quantizer, or of its Gaussian). The papers add a perceptual
network and a discriminator: `--losses paper` (with torchvision and its weights of VGG-16), whose weights are
    in `recipes.py`.

`--output FOLDER` gets `state.pt` (everything that --resume needs), `model.safetensors` (the averaged weights)
and `loss.png`. Batches depend on the seed and the number of the step alone, so a resumed run sees what an
uninterrupted one would have seen.

VidTok's two stages: train a model, then its decoder alone, on crops of twice the height and width:

    python examples/train.py --model vidtok --stage 2 --start data/run/model.safetensors --output ...
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

# This, initialize, recipes and training_data lie beside this file
from adversary import (
    Adversary,
    perceptual_distance,
)
from initialize import initialize
from recipes import RECIPES, weights_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from training_data import Clips, parse_hold_out

from vtok_fast import metrics
from vtok_fast.commands.load_model import systems
from vtok_fast.io.files import write_atomically
from vtok_fast.io.video import read_video

Perceptual = Callable[[Tensor, Tensor], Tensor]


LOSSES = {
    "mse": "weight of the squared error",
    "edges": "weight of the error of neighboring pixels' differences",
    "aux": "weight of the model's own loss",
    "lpips": "weight of the perceptual distance; needs torchvision and its weights of VGG-16",
    "gan": "weight of the adversarial term, a share of the reconstruction's gradient",
    "gan_start": "the first step with a discriminator",
    "lecam": "weight of the discriminator's LeCam term",
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small tokenizer on a folder of clips.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(RECIPES), default="vidtok")
    parser.add_argument("--config", help="a configuration by name; default: that of --start, or tiny")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of video files")
    parser.add_argument(
        "--hold-out", type=parse_hold_out, metavar="FILE:FIRST-END", help="frames for validation only"
    )
    parser.add_argument("--output", type=Path, default=Path("data/run"))
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument(
        "--minutes", type=float, help="stop after so many minutes of training, resumed ones counted together"
    )
    parser.add_argument(
        "--stop",
        type=int,
        metavar="STEP",
        help="stop at this step, to be resumed; the schedule stays that of the whole run",
    )
    parser.add_argument(
        "--crop",
        type=parse_crop,
        nargs="+",
        metavar="BxTxHxW",
        help="shapes of batches, one drawn per step; default: as suits the model",
    )
    parser.add_argument("--lr", type=float, help="highest learning rate; default: as suits the model")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--clip", type=float, default=1.0, help="highest norm of the gradient")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument(
        "--losses",
        choices=("package", "paper"),
        default="package",
        help="weights of the ones below that are not given",
    )
    for name, text in LOSSES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int if name == "gan_start" else float, help=text
        )
    parser.add_argument(
        "--saturation",
        type=float,
        default=0.1,
        help="vidtok: weight of the penalty on latents where tanh is flat",
    )
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin with these weights")
    parser.add_argument(
        "--grow",
        action="store_true",
        help="promag: grow the model of --start by a stage; what it was is frozen",
    )
    parser.add_argument(
        "--stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: from --start, the decoder alone, on crops of twice the height and width",
    )
    parser.add_argument("--train", choices=("all", "decoder"), help="what learns; default: as the stage says")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="bfloat16 autocast; on a CPU fast where it has the instructions",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--every", type=int, default=500, help="validate and save every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from --output")
    options = parser.parse_args(argv)
    if options.steps is None and options.minutes is None:
        parser.error("give --steps or --minutes")
    if options.stage == 2 and options.start is None:
        parser.error("--stage 2 needs the weights of stage 1: --start FILE")
    if options.grow and (options.start is None or options.model != "promag"):
        parser.error("--grow needs --model promag and the lower model: --start FILE")
    recipe = RECIPES[options.model]
    options.train = options.train or ("all", "decoder")[options.stage - 1]
    options.crop = options.crop or [
        (b, t, options.stage * h, options.stage * w) for b, t, h, w in recipe.crops
    ]
    options.lr = recipe.lr if options.lr is None else options.lr
    return options


def parse_crop(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"crop={text!r}: expected BxTxHxW")
    return shape


@dataclass
class State:
    """What a run is made of, and what its checkpoint holds."""

    model: torch.nn.Module
    average: torch.nn.Module
    optimizer: torch.optim.Optimizer
    adversary: Adversary | None = None
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    validations: list[list[float]] = field(default_factory=list)  # [step, PSNR in dB]

    def save(self, folder: Path) -> None:
        state = {
            **{name: part.state_dict() for name, part in self.parts().items()},
            **{key: getattr(self, key) for key in ("step", "seconds", "losses", "validations")},
        }
        write_atomically(folder / "state.pt", lambda temporary: torch.save(state, temporary))
        self.average.save(folder / "model.safetensors")
        plot(self, folder / "loss.png")

    def parts(self) -> dict:
        names = ("model", "average", "optimizer", "adversary")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        if ("adversary" in state) != (self.adversary is not None):
            raise ValueError(
                f"gan: the run in {folder} was {'made' if 'adversary' in state else 'not made'} with a "
                f"discriminator"
            )
        for name, part in self.parts().items():
            part.load_state_dict(state.pop(name))
        for name, value in state.items():
            setattr(self, name, value)


def learning_rate(options: argparse.Namespace, state: State) -> float:
    """Linear warm-up, then a cosine to 1% over whichever budget, steps or minutes, is further spent."""
    done = max(progress(options, state), 0.0)
    warm = min(1.0, (state.step + 1) / max(1, options.warmup))
    return options.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def progress(options: argparse.Namespace, state: State) -> float:
    by_steps = state.step / options.steps if options.steps else 0.0
    by_time = state.seconds / (60 * options.minutes) if options.minutes else 0.0
    return max(by_steps, by_time)


def loss_of(
    model: torch.nn.Module,
    x: Tensor,
    options: argparse.Namespace,
    step: int,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch x, and its reconstruction."""
    latents: list[Tensor] = []
    if options.saturation and getattr(model.config, "regularizer", "") == "fsq":
        handle = model.encoder.register_forward_hook(lambda module, args, z: latents.append(z.float()))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=options.bf16):
        if options.aux:
            result = model.reconstruct(x, step=step)
            y, aux = result.video.float(), options.aux * result.loss
        else:
            y, aux = model(x).float(), 0.0
    if latents:
        handle.remove()
        # Beyond 1.5 the bound of the quantizer is flat: no gradient leads back, and 8 levels become 2.
        aux = aux + options.saturation * F.relu(latents[-1].abs() - 1.5).square().mean()
    loss = reconstruction_error(y, x, options.mse, options.edges)
    if perceptual is not None:
        loss = loss + options.lpips * perceptual(y, x)
    if adversary is not None and step >= options.gan_start:
        loss = loss + adversary.term(y, loss)
    return loss + aux, y


def reconstruction_error(y: Tensor, x: Tensor, mse: float = 2.0, edges: float = 0.2) -> Tensor:
    """Mean absolute error, plus the squared one, plus that of neighboring pixels' differences."""
    error = y - x
    differences = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3, 4))
    return error.abs().mean() + mse * error.square().mean() + edges * differences


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # the first weights are forgotten quickly
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
    # Running means are means already
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


@torch.inference_mode()
def psnr(model: torch.nn.Module, video: Tensor) -> float:
    """Of the reconstruction of video (B, 3, T, H, W), for values in [-1, 1], in dB."""
    return metrics.psnr(torch.cat([model(clip[None]) for clip in video]), video)


def validation_clips(options: argparse.Namespace) -> Tensor | None:
    if options.hold_out is None:
        return None
    name, first, last = options.hold_out
    t, h, w = RECIPES[options.model].validation
    video = read_video(options.data / name, size=(h, w), start=first, frames=last - first).video
    if video.shape[1] < t:
        raise ValueError(f"hold_out: {video.shape[1]} frames are fewer than the {t} of a validation clip")
    return torch.stack([video[:, i : i + t] for i in range(0, video.shape[1] - t + 1, t)][:8])


def smoothed(losses: list[float], points: int) -> tuple[list[int], list[float]]:
    """The steps at which so many pieces of a curve begin, and their means."""
    size = max(1, len(losses) // points)
    pieces = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [i * size for i in range(len(pieces))], [sum(piece) / len(piece) for piece in pieces]


def plot(state: State, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*smoothed(state.losses, 200), color="#4063d8", label="training loss")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    if state.validations:
        right = axes.twinx()
        right.plot(*zip(*state.validations, strict=True), color="#cb3c33", marker=".", label="held out")
        right.set_ylabel("PSNR of held-out frames, dB", color="#cb3c33")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    """Raises ValueError for a configuration whose frozen part nobody trained."""
    kind = systems()[options.model]
    if options.start is not None:
        model = kind.from_checkpoint(options.start, options.config)
        return (model.grow() if options.grow else model).train()
    model = kind(options.config or "tiny")
    if getattr(model.config, "growth", 0) and model.config.freeze_lower:
        raise ValueError(
            f"config={options.config!r}: its lower model is frozen; train that first, then --start FILE "
            f"--grow"
        )
    return model.train()


def train(options: argparse.Namespace, console: Console) -> State:
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    model = make_model(options)
    weights = weights_of(options.model, options.losses, getattr(model.config, "regularizer", "") == "kl")
    for name, value in weights.items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    clips, validation, device = (
        Clips(options.data, options.hold_out),
        validation_clips(options),
        torch.device(options.device),
    )
    if options.model == "vidtok" and options.start is None:
        initialize(model, clips.sample(random.Random(options.seed), (8, *options.crop[0][1:])))
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (options.train == "all" or "decoder" in name))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay
    )
    adversary = (
        Adversary(weight=options.gan, lecam=options.lecam, lr=options.lr, device=device)
        if options.gan
        else None
    )
    perceptual = perceptual_distance() if options.lpips else None
    state = State(model, copy.deepcopy(model).eval().requires_grad_(False), optimizer, adversary)
    if options.resume:
        state.load(options.output)
    console.print(
        f"{options.model} {model.config.name}: {sum(p.numel() for p in learning):,} parameters learn, "
        f"on {device} ({torch.get_num_threads()} threads), from step {state.step}"
    )
    columns = (
        TextColumn(
            "step {task.fields[step]:>6}  loss {task.fields[loss]:.4f}  held out {task.fields[psnr]} dB"
        ),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=1.0, step=state.step, loss=0.0, psnr="-")
        while progress(options, state) < 1.0 and state.step != options.stop:
            began = time.perf_counter()
            dice = random.Random(f"{options.seed} {state.step}")
            x = clips.sample(dice, dice.choice(options.crop)).to(device, non_blocking=True)
            loss, y = loss_of(model, x, options, state.step, perceptual, adversary)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, state)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(learning, options.clip)
            if torch.isfinite(norm):  # one bad batch must not end a run
                optimizer.step()
                if adversary is not None and state.step >= options.gan_start:
                    adversary.learn(y, x)
            state.step += 1
            update_average(state.average, model, options.ema, state.step)
            state.losses.append(loss.item())
            state.seconds += time.perf_counter() - began
            last = progress(options, state) >= 1.0 or state.step == options.stop
            if last or state.step % options.every == 0:
                if validation is not None:
                    state.validations.append([state.step, psnr(state.average, validation.to(device))])
                    bar.update(task, psnr=f"{state.validations[-1][1]:.2f}")
                state.save(options.output)
                recent = state.losses[-options.every :]
                line = {
                    "step": state.step,
                    "minutes": round(state.seconds / 60, 2),
                    "loss": round(sum(recent) / len(recent), 4),
                    "psnr": round(state.validations[-1][1], 3) if validation is not None else None,
                }
                console.print(json.dumps(line), highlight=False, soft_wrap=True)
            bar.update(task, completed=progress(options, state), step=state.step, loss=state.losses[-1])
    return state


def main(argv: list[str] | None = None) -> int:
    try:
        train(arguments(argv), Console())
    except (OSError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
