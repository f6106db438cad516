"""`vtok-fast corpus`: many videos to tokens, and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtok_fast.commands.options import Json, pixels, print_json

if TYPE_CHECKING:
    from vtok_fast.corpus.drive import Progress


def corpus(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, patterns in quotes, manifests (.csv, .jsonl, .parquet) or videos, of this machine "
            "or as addresses such as s3://bucket/videos."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the corpus.")],
    model: Annotated[str, typer.Option(help="System and configuration.")] = "vidtok/tiny",
    checkpoint: Annotated[Path | None, typer.Option(help="The model's weights.")] = None,
    engine: Annotated[str, typer.Option(help="local (this machine) or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes. Default: 1; with ray, one for each GPU or --cores cores.")
    ] = None,
    cores: Annotated[int, typer.Option(help="Of each worker without a GPU, with ray.")] = 4,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, as in auto.")] = None,
    shards: Annotated[
        int | None, typer.Option(help="Clips of each shard, some thousand. Default: a file for each clip.")
    ] = None,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="Videos of tokens: files of them, or a corpus.")
    ] = False,
    any_weights: Annotated[bool, typer.Option("--any-weights", help="As for detokenize.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed.")] = False,
    column: Annotated[str | None, typer.Option(help="The column of addresses in a manifest.")] = None,
    size: Annotated[str | None, typer.Option(help="HxW or N, as for tokenize.")] = None,
    window: Annotated[int | None, typer.Option(help="As for tokenize.")] = None,
    overlap: Annotated[int | None, typer.Option(help="As for tokenize.")] = None,
    rate: Annotated[float | None, typer.Option(help="As for tokenize.")] = None,
    fps: Annotated[float | None, typer.Option(help="Resample to this constant rate.")] = None,
    deinterlace: Annotated[bool, typer.Option("--deinterlace", help="As for tokenize.")] = False,
    on_error: Annotated[str, typer.Option(help="Of damage: stop, skip or conceal.")] = "stop",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    accelerate: Annotated[bool, typer.Option(help="Swap the fast kernels in.")] = True,
    as_json: Json = False,
) -> None:
    """Tokenize a corpus, or what of it is missing or has changed. The exit code is 1 if a clip failed.

    DIR/manifest.jsonl says how each input ended. The same command goes on after whatever ended it.
    """
    from vtok_fast.corpus.drive import make_corpus

    options = {"size": None if size is None else pixels(size), "window": window, "overlap": overlap}
    options |= {"rate": rate, "fps": fps, "deinterlace": "bwdif" if deinterlace else None}
    options |= {"on_error": None if on_error == "stop" else on_error}
    with _Line(as_json) as line:
        progress = make_corpus(
            inputs,
            output,
            model=model,
            checkpoint=None if checkpoint is None else str(checkpoint),
            device=device,
            dtype=dtype,
            accelerate=accelerate,
            engine=engine,
            workers=workers,
            cores=cores,
            address=address,
            shards=shards,
            detokenize=detokenize,
            any_weights=any_weights,
            retry_failed=retry_failed,
            column=column,
            progress=line.show,
            **options,
        )
    if as_json:
        print_json({"output": str(output), **progress.facts()})
    else:
        print(text_of(progress))
    raise typer.Exit(int(progress.failed > 0))


def text_of(progress: Progress) -> str:
    """A line that says how far it is, how fast, and what it waits for."""
    text = (
        f"{progress.done + progress.unchanged} of {progress.total} clips ({progress.unchanged} unchanged), "
        f"{progress.failed} failed, {progress.skipped} skipped"
    )
    if progress.done and progress.seconds:
        clips, frames, tokens = (progress.per_second(name) for name in ("done", "frames", "tokens"))
        whole = sum(progress.spent.values()) or 1.0
        shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in progress.spent.items())
        text += (
            f"; {clips:.2f} clips, {frames:.1f} frames, {tokens:,.0f} tokens a second; "
            f"{progress.bytes / 1e6:,.1f} MB; most time in {progress.bottleneck} ({shares})"
        )
    return text


class _Line:
    """One line on standard error that is written over: of a terminal only."""

    def __init__(self, quiet: bool):
        self.shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> _Line:
        return self

    def show(self, progress: Progress) -> None:
        if self.shown:
            print(f"\r\033[K{text_of(progress)}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
