"""`vtok-fast export`: a corpus in the formats of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok_fast.commands.options import Json, print_json


def export(
    corpus: Annotated[Path, typer.Argument(help="The folder that `vtok-fast corpus` made.")],
    to: Annotated[str, typer.Option("--to", help="parquet or webdataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    clips_per_file: Annotated[int, typer.Option(help="Clips of each file.")] = 10_000,
    as_json: Json = False,
) -> None:
    """Write a corpus as Parquet or as the tar files of WebDataset. The result is whole, or not there."""
    from vtok_fast.corpus.export import export as write

    files = write(corpus, output, to, clips_per_file=clips_per_file)
    facts = {"output": str(output), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    if as_json:
        print_json(facts)
    else:
        print(f"{facts['files']} files, {facts['bytes'] / 1e6:,.1f} MB, in {output}")
