"""The command `vtok-fast`: info, doctor, demo, check, bench (in commands/bench.py), tune, probe, tokenize,
detokenize, score.

Whatever needs torch is imported inside the commands, so that `doctor` and `--help` work without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok_fast import __version__
from vtok_fast.commands.bench import app as bench
from vtok_fast.commands.options import (
    Json,
    device_of,
    dtype_of,
    numbers,
    pixels,
    print_json,
    stdout_for_json,
)

app = typer.Typer(
    help="Fast kernels for video tokenizers.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


def main() -> None:
    """The console script: an expected error is one line on standard error and exit code 1."""
    try:
        app()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"vtok-fast: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vtok-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, the processor, GPUs, and for each op and backend whether it can run here, or why not."""
    from vtok_fast.commands.info import facts
    from vtok_fast.commands.info import main as show

    if as_json:
        print_json(facts())
    else:
        show()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for what is wrong with this installation; exit code 1 if something is."""
    from vtok_fast.installation.doctor import examine
    from vtok_fast.installation.doctor import main as report

    if not as_json:
        raise typer.Exit(report())
    findings = examine()
    print_json([dataclasses.asdict(finding) for finding in findings])
    raise typer.Exit(int(any(finding.level == "bad" for finding in findings)))


@app.command()
def demo(
    video: Annotated[
        Path | None,
        typer.Option(help="A video file. Default: the clip that scripts/fetch_clip.py puts into data/."),
    ] = None,
    config: Annotated[str, typer.Option(help="A VidTok configuration by name.")] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Its weights. Without, a released configuration runs on random ones.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 128,
    start: Annotated[int | None, typer.Option(help="First frame.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of 17 frames.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed repetitions of each variant.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: torch's own choice.")] = None,
    as_json: Json = False,
) -> None:
    """Put a real clip through VidTok, in plain PyTorch and accelerated, and show what differs."""
    import torch
    from rich.console import Console

    from vtok_fast.commands.demo import Options, run

    if threads is not None:
        torch.set_num_threads(threads)
    options = Options(video, config, checkpoint, output, size, start, chunks, rounds)
    console = Console(width=None if sys.stdout.isatty() else 120)
    result = run(options) if as_json else run(options, console.print)
    if as_json:
        print_json(result)
    raise typer.Exit(0 if result["parity"]["ok"] else 1)


Checkpoint = Annotated[Path | None, typer.Option(help="The model's weights. vidtok/tiny brings its own.")]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="The file to write. Beside it lies OUTPUT.parts while the work lasts."
    ),
]
Accelerate = Annotated[bool, typer.Option(help="Swap the fast kernels in.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU where there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="fp32, bf16 or fp16. The default, on a GPU too, is what models are stored in: in another "
        "one some tokens come out differently."
    ),
]


Fps = Annotated[
    float | None,
    typer.Option(help="Resample to this constant rate, by time. Default: every frame, at its own time."),
]
Deinterlace = Annotated[
    bool, typer.Option("--deinterlace", help="Make whole frames of the fields of interlaced video (bwdif).")
]
Deinterlacer = Annotated[str, typer.Option(help="What --deinterlace takes: bwdif or yadif.")]
Hdr = Annotated[str, typer.Option(help="PQ and HLG: tonemap (as on a standard display) or error.")]
Background = Annotated[str, typer.Option(help="Under what is transparent: black, white, gray or RRGGBB.")]
OnError = Annotated[
    str,
    typer.Option(
        help="Of damage: stop, skip (leave out what cannot be right) or conceal (keep what the decoder "
        "makes of it)."
    ),
]
Stream = Annotated[int | None, typer.Option(help="Which video stream, from 0. Default: as a player chooses.")]


def _reading(fps: float | None, deinterlace: bool, deinterlacer: str, hdr: str, background: str,
             on_error: str, stream: int | None) -> dict[str, Any]:  # fmt: skip
    """The options of reading, for `vtok_fast.io.video.Reading`, without those that are as usual."""
    from vtok_fast.commands.probe import rgb_of

    given = {
        "fps": fps,
        "deinterlace": deinterlacer if deinterlace else None,
        "hdr": hdr,
        "background": rgb_of(background),
        "on_error": on_error,
        "stream": stream,
    }
    usual = {"hdr": "tonemap", "background": (0, 0, 0), "on_error": "stop"}
    return {name: value for name, value in given.items() if value != usual.get(name)}


@app.command()
def probe(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a contact sheet of the frames as they are read (PNG).")
    ] = None,
    fps: Fps = None,
    deinterlace: Deinterlace = False,
    deinterlacer: Deinterlacer = "bwdif",
    hdr: Hdr = "tonemap",
    background: Background = "black",
    on_error: OnError = "stop",
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Print how a video would be read: streams, size, rotation, times, colors, and what is dropped and
    why."""
    from vtok_fast.commands import probe as prober

    reading = _reading(fps, deinterlace, deinterlacer, hdr, background, on_error, stream)
    found = prober.probe(video, **reading)
    if plot is not None:
        prober.contact_sheet(video, plot, **reading)
    if as_json:
        print_json(found)
    else:
        prober.show(found)
    raise typer.Exit(0 if found["readable"] else 1)


@app.command()
def tokenize(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    output: Output,
    model: Annotated[
        str, typer.Option(help="System and configuration, as in vidtok/fsq_causal_488_32768.")
    ] = "vidtok/tiny",
    checkpoint: Checkpoint = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="HxW: scale and cut; N: scale the shorter side to it. Default: as the file has it."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Frames that are tokenized together, and bound the memory. Default: 17, or 16 "
            "of a model that is not causal; of infotok 81; of promag a chunk; of tivtok eight chunks (128), "
            "which share "
            "their invariant tokens; of vtok 16, with a key frame for each window."
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            help="Frames that two windows share, and that are blended. Default: of infotok 3, "
            "of promag its overlap, else 0."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Share of the tokens to keep (infotok). Default: as the model is configured."),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="What scores tokens (infotok): decode, latent or even. Default: as configured."),
    ] = None,
    rate_strategy: Annotated[
        str | None,
        typer.Option(
            help="elbo (the rate in each window), global_elbo (more of windows that are "
            "hard, by their scores against --elbo-mean), bin, elbo_ema (infotok). Default: the model's."
        ),
    ] = None,
    elbo_mean: Annotated[
        float | None,
        typer.Option(
            help="The mean score of your data, for global_elbo and bin. Default: that of "
            "this video, found in a pass of its own."
        ),
    ] = None,
    fps: Fps = None,
    deinterlace: Deinterlace = False,
    deinterlacer: Deinterlacer = "bwdif",
    hdr: Hdr = "tonemap",
    background: Background = "black",
    on_error: OnError = "stop",
    stream: Stream = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    accelerate: Accelerate = True,
    as_json: Json = False,
) -> None:
    """Write the tokens of a video, in memory for one window. A run that was stopped goes on where it was."""
    from vtok_fast.commands import tokenize as video_tokens
    from vtok_fast.io.files import check_distinct

    scaled = None if size is None else pixels(size)
    reading = _reading(fps, deinterlace, deinterlacer, hdr, background, on_error, stream)
    check_distinct(output, video=video, checkpoint=checkpoint)
    chosen, weights = _model(device, dtype, accelerate, model, checkpoint)
    with _progress(as_json, "windows") as progress:
        windows = video_tokens.tokenize(
            video,
            output,
            chosen,
            size=scaled,
            window=window,
            overlap=overlap,
            weights=weights,
            progress=progress,
            rate=rate,
            router=router,
            rate_strategy=rate_strategy,
            elbo_mean=elbo_mean,
            **reading,
        )
    count = sum(
        int((tokens.data >= 0).sum()) if tokens.latents is None else tokens.data[:, 0].numel()
        for tokens in windows
    )
    facts = {
        "output": str(output),
        "model": windows.model,
        "frames": windows.info["frames"],
        "size": list(windows[0].video_shape[1:]),
        "windows": len(windows),
        "tokens": count,
        "bytes": output.stat().st_size,
        "left_out": sum(one["count"] for one in windows.info.get("left_out", ())),
        "concealed": sum(one["count"] for one in windows.info.get("concealed", ())),
    }
    if as_json:
        print_json(facts)
    else:
        size_text = "x".join(map(str, facts["size"]))
        print(
            f"{facts['frames']} frames of {size_text} as {facts['tokens']:,} tokens of {windows.model} in "
            f"{output}"
            + "".join(
                f"; {facts[name]} frames {what}, listed there"
                for name, what in (("left_out", "left out"), ("concealed", "concealed"))
                if windows.info.get(name)
            )
        )


@app.command()
def detokenize(
    tokens: Annotated[Path, typer.Argument(help="What tokenize wrote.")],
    output: Output,
    model: Annotated[str | None, typer.Option(help="Default: the one that made the tokens.")] = None,
    checkpoint: Checkpoint = None,
    any_weights: Annotated[
        bool,
        typer.Option(
            "--any-weights",
            help="Decode with other weights than the tokens were made with, as "
            "those of a decoder that was fine-tuned since.",
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = "fp32",
    accelerate: Accelerate = True,
    as_json: Json = False,
) -> None:
    """Write the video (MP4) of a file of tokens, in memory for one window. A run that was stopped goes on
    where it was."""
    from vtok_fast.commands import tokenize as video_tokens
    from vtok_fast.io.files import check_distinct
    from vtok_fast.io.token_windows import TokenWindows

    check_distinct(output, tokens=tokens, checkpoint=checkpoint)
    windows = TokenWindows(tokens)
    config = windows.config if model is None else None
    chosen, weights = _model(device, dtype, accelerate, model or windows.model, checkpoint, config)
    with _progress(as_json, "windows") as progress:
        video_tokens.detokenize(
            tokens, output, chosen, weights=weights, any_weights=any_weights, progress=progress
        )
    facts = {
        "output": str(output),
        "model": windows.model,
        "frames": windows.info.get("frames"),
        "size": list(windows[0].video_shape[1:]),
    }
    if as_json:
        print_json(facts)
    else:
        print(f"{output}: {facts['frames']} frames of {'x'.join(map(str, facts['size']))}")


@app.command()
def score(
    original: Annotated[Path, typer.Argument(help="The video that was tokenized.")],
    reconstruction: Annotated[Path, typer.Argument(help="What detokenize made of it.")],
    tokens: Annotated[
        Path | None, typer.Option(help="The tokens between: bits per pixel and use of the codebook too.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="The --size that it was tokenized with. Default: by the reconstruction."),
    ] = None,
    fvd_network: Annotated[
        Path | None,
        typer.Option(help="A TorchScript network (I3D) of yours: FVD of the clips of 16 frames too."),
    ] = None,
    fps: Fps = None,
    deinterlace: Deinterlace = False,
    deinterlacer: Deinterlacer = "bwdif",
    hdr: Hdr = "tonemap",
    background: Background = "black",
    on_error: OnError = "stop",
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Compare a reconstructed video with its original, by time: PSNR, SSIM, LPIPS where its weights are, and
    what the tokens cost."""
    from vtok_fast.commands.score import score as measure

    reading = _reading(fps, deinterlace, deinterlacer, hdr, background, on_error, stream)

    with _progress(as_json, "frames") as progress:
        found = measure(
            original,
            reconstruction,
            tokens=tokens,
            size=None if size is None else pixels(size),
            fvd_network=fvd_network,
            progress=progress,
            **reading,
        )
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "psnr": ("PSNR, dB", "{:.2f}".format),
        "ssim": ("SSIM", "{:.4f}".format),
        "lpips": ("LPIPS", "{:.4f}".format),
        "no_lpips": ("LPIPS", "not measured: {}".format),
        "fvd": ("FVD", "{:.1f}".format),
        "clips": ("clips of FVD", str),
        "tokens": ("tokens", "{:,}".format),
        "bits_per_pixel": ("bits per pixel", "{:.4f}".format),
        "codebook_used": ("codebook used", "{:.1%}".format),
        "perplexity": ("codebook perplexity", "{:.1f}".format),
    }
    table = Table(
        "measure", "value", title=f"{found['frames']} frames of {'x'.join(map(str, found['size']))}"
    )
    for key, (name, form) in forms.items():
        if key in found:
            table.add_row(name, form(found[key]))
    Console().print(table)


def _model(device: str | None, dtype: str, accelerate: bool, *names: Any) -> tuple[Any, str]:
    """A model by the arguments of `load_model`, ready to run, and the fingerprint of its weights as they are
    stored."""
    import vtok_fast
    from vtok_fast.commands import tokenize as video_tokens

    chosen, where = dtype_of(dtype), device_of(device)
    model = video_tokens.load_model(*names)
    weights = video_tokens.fingerprint(model)
    model.to(where, chosen)
    if accelerate:
        vtok_fast.accelerate(model)
    return model, weights


@contextlib.contextmanager
def _progress(quiet: bool, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error, as a function of what is done and of how much there is (None: unknown)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def check(
    models: Annotated[
        bool,
        typer.Option("--models", help="The tokenizers instead of the ops, each accelerated, on a real clip."),
    ] = False,
    video: Annotated[
        Path | None, typer.Option(help="With --models: the clip. Default: the demo's, or a synthetic one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every op and a VidTok, or every tokenizer, with the reference on this machine; exit code 1 if
    one is too far off."""
    if models:
        from vtok_fast.commands.check_models import model_outcomes, real_clip

        clip, source = real_clip(video)
        found = list(model_outcomes(clip))
    else:
        from vtok_fast.commands.check import outcomes

        found, source = list(outcomes()), None
    failed = [outcome for outcome in found if not outcome.ok]
    if as_json:
        print_json(
            {
                "ok": not failed,
                **({"video": source} if models else {}),
                "outcomes": [dataclasses.asdict(outcome) for outcome in found],
            }
        )
        raise typer.Exit(int(bool(failed)))
    from rich.console import Console
    from rich.table import Table

    table = Table("model" if models else "op", "backend", "case", "result", title=source)
    for outcome in found:
        text = (
            f"not run: {outcome.skipped}"
            if outcome.skipped
            else ("" if outcome.ok else "TOO FAR: ") + outcome.text
        )
        table.add_row(outcome.op, outcome.backend, outcome.case, text)
    console = Console()
    console.print(table)
    skipped = sum(outcome.skipped is not None for outcome in found)
    console.print(
        f"{len(found) - len(failed) - skipped} within their contract, {len(failed)} not, {skipped} not run"
    )
    raise typer.Exit(int(bool(failed)))


@app.command()
def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="vidtok/CONFIG, a model of another library, as 'Wan 2.1', or an op for its "
            "workloads, as scope_attention."
        ),
    ] = "vidtok/tiny",
    size: Annotated[str | None, typer.Option(help="The video, TxHxW.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16. Default: fp32 on a CPU, bf16 on a GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU where there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, a small video.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: the user's cache, where it is found.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the classes.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the ways to run a model's layers on this machine, and remember the fastest for the
    dispatcher."""
    from vtok_fast.bench.harness import Settings
    from vtok_fast.commands import tune as tuner

    shape = numbers(size, "size")
    if shape is not None and len(shape) != 3:
        raise ValueError(f"size={size!r}: expected TxHxW, such as 17x256x256")
    settings = Settings.of(
        quick=quick, seconds=None if quick else 0.3, device=str(device_of(device)), dtype=dtype_of(dtype)
    )
    with stdout_for_json(as_json):
        result = tuner.run(model, settings, size=shape, output=output, dry_run=dry_run)
    if as_json:
        print_json(result)
    elif dry_run:
        print("\n".join(f"{op}: {key}" for op, keys in result["classes"].items() for key in keys))
    else:
        faster, classes = (sum(map(len, result[name].values())) for name in ("entries", "classes"))
        print(f"{faster} of {classes} classes are faster tuned; in {result['file']}")


if __name__ == "__main__":
    main()
