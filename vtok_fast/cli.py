"""The command `vtok-fast`: info, doctor, demo, check, tune; bench (commands/bench.py); probe, tokenize,
detokenize, score (commands/video_files.py).

Whatever needs torch is imported inside the commands, after their arguments have been looked at: `--help` and
a mistake are answered at once, and `doctor` works without it.

Exit codes: 0, done; 1, an error or a check that failed; 2, a command line that makes no sense; 130, ctrl-C.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vtok_fast import __version__
from vtok_fast.commands import names, video_files
from vtok_fast.commands.bench import app as bench
from vtok_fast.commands.corpus import corpus
from vtok_fast.commands.export import export
from vtok_fast.commands.options import (
    Force,
    Json,
    device_of,
    dtype_of,
    numbers,
    print_json,
    stdout_for_json,
)


class _Commands(TyperGroup):
    """Ctrl-C is one line, too."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stop:
            print(f"vtok-fast: stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Fast kernels for video tokenizers.",
    epilog="Exit codes: 0 done; 1 an error, or a check that failed; 2 a wrong command line; 130 ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command()(corpus)
app.command()(export)


def main() -> None:
    """The console script: an expected error is one line on standard error and exit code 1."""
    if {"tokenize", "detokenize"} & set(sys.argv[1:2]):
        from vtok_fast.commands.heap import keep_freed_memory

        keep_freed_memory()
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


DEMO_FILES = ("demo.png", "demo.json", "reconstruction.mp4", "tokens.safetensors")


@app.command()
def demo(
    video: Annotated[
        Path | None,
        typer.Option(
            help="A video file. Default: a real clip, data/bikes.mp4 or one that pip fetches once; without a "
            "network one that is drawn."
        ),
    ] = None,
    config: Annotated[
        str, typer.Option(help="A VidTok configuration by name.", autocompletion=names.complete_config)
    ] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Its weights. Without, a released configuration runs on random ones.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 128,
    start: Annotated[int | None, typer.Option(help="First frame.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of 17 frames.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed repetitions of each variant.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: torch's own choice.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put a real clip through VidTok, in plain PyTorch and accelerated, and show what differs."""
    names.check_config(config)
    names.check_input("video", video)
    names.check_input("checkpoint", checkpoint)
    there = [name for name in DEMO_FILES if (output / name).exists()]
    if there and not force:
        raise FileExistsError(f"output: {output / there[0]} is there already; --force replaces it")
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


for _command in (video_files.probe, video_files.tokenize, video_files.detokenize, video_files.score):
    app.command()(_command)


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
