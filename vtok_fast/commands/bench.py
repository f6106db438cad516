"""The commands ``vtok-fast bench`` and ``vtok-fast bench compare``. What needs torch is imported inside
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vtok_fast.bench.sections import SECTIONS
from vtok_fast.commands import names as names_of_files
from vtok_fast.commands import options
from vtok_fast.commands.options import Force, Json


class _RunByDefault(TyperGroup):
    """``bench fsq`` is ``bench run fsq``, whose options the group's help therefore shows too."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        if not arguments or (arguments[0] not in self.commands and arguments[0] != "--help"):
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)

    def format_help(self, context: Any, formatter: Any) -> None:
        super().format_help(context, formatter)
        run = self.commands["run"]
        run.format_help(run.context_class(run, info_name="run", parent=context), formatter)


app = typer.Typer(
    cls=_RunByDefault,
    help="Time each op beside its strongest peers (bench run, or just bench), or compare two results.",
)


@app.command()
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(SECTIONS)}. Default: all."),
    ] = None,
    op: Annotated[
        str | None, typer.Option(help="The same as a name; with --shape a workload of your own.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only workloads of this model: vidtok, wan2.1, cosmos, tivtok, ...")
    ] = None,
    match: Annotated[
        str | None, typer.Option("-k", help="Only cases whose name has all of these words.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Own shape: B,C,T,H,W; scope_attention: B,heads,tokens,head size.")
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="causal_conv3d: kt,kh,kw.")] = None,
    stride: Annotated[str | None, typer.Option(help="causal_conv3d: time,height,width.")] = None,
    channels: Annotated[
        int | None, typer.Option(help="causal_conv3d: output channels. Default: as the input.")
    ] = None,
    time_mode: Annotated[
        str | None, typer.Option(help="causal_conv3d: zeros, replicate, or cache (earlier frames given).")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="norm_act: layer, rms, group; scope_attention: time invariant, block causal, "
            "per frame; token_packing: router, pack, unpack; fsq: planar, ..."
        ),
    ] = None,
    groups: Annotated[int | None, typer.Option(help="norm_act: groups.")] = None,
    levels: Annotated[str | None, typer.Option(help="fsq: levels, as 8,8,8,5,5,5.")] = None,
    numbers: Annotated[
        str | None, typer.Option(help="scope_attention: frames,tokens per frame; or tiv,tv,patches,slices.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Own shape: torch.compile (and FlexAttention) among the peers.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16. Default: fp32 on a CPU, bf16 on a GPU.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU where there is one.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few, small cases and few rounds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also what takes minutes.")] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Without torch.compile and FlexAttention.")
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="On a GPU also the replay of each call as a CUDA graph, without the host's launches.",
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="On a CPU also the peak memory of each call, in a process of its own "
            "(on a GPU it always stands there).",
        ),
    ] = False,
    seconds: Annotated[float | None, typer.Option(help="Measure each case for at least so long.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would run.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A results file to write or to add to; in a folder, the file named after this machine.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture to write: roofline and speed-up bars.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time ops and models beside their strongest peers, in one run; exit code 1 if a result of ours is
    wrong."""
    if plot is not None:
        names_of_files.check_output(plot, names_of_files.PICTURES, force=force, what="a picture")
    import torch

    from vtok_fast.bench import harness, report
    from vtok_fast.bench import run as runner
    from vtok_fast.bench.own import Own

    device = device or options.default_device()
    if not dry_run:
        options.device_of(device)
    settings = harness.Settings.of(
        quick=quick,
        full=full,
        seconds=seconds,
        device=device,
        dtype=options.dtype_of(dtype),
        compile=not no_compile,
        graphs=graphs,
        memory=memory,
    )
    wish = None
    given = (shape, kernel, stride, channels, time_mode, kind, groups, levels, numbers)
    if any(value is not None for value in given) or compiled:
        wish = Own(
            options.numbers(shape, "shape"),
            options.numbers(kernel, "kernel"),
            options.numbers(stride, "stride"),
            channels,
            time_mode,
            kind,
            groups,
            options.numbers(levels, "levels"),
            options.numbers(numbers, "numbers"),
            compiled,
        )
    chosen = runner.choose(
        [*(names or ()), *([op] if op else [])], settings, model=model, match=match, wish=wish
    )
    if dry_run:
        _list(runner.listing(chosen, settings), as_json)
        return
    if not settings.on_gpu:
        harness.pin_allocator()
    if threads:
        torch.set_num_threads(threads)
    if output is not None and output.is_dir():
        from vtok_fast.bench import machine

        output = output / f"{machine.slug(machine.describe(device))}.json"
    with options.stdout_for_json(as_json):
        results = runner.run(chosen, settings, file=output)
    if plot is not None:
        from vtok_fast.bench import picture

        picture.draw(results, plot)
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        report.show(results)
    raise typer.Exit(int(any(case.get("wrong") for s in results["sections"].values() for case in s["cases"])))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A results file.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
    changed: Annotated[bool, typer.Option("--changed", help="Only what changed.")] = False,
    as_json: Json = False,
) -> None:
    """Before, after, their ratio and the noise of every case: times faster than eager on a CPU, calls per
    second on a GPU, so that more is better. A verdict is beyond the noise of both; exit code 1 if anything
    became slower."""
    for path in (before, after):
        names_of_files.check_input("results file", path)
    from vtok_fast.bench import compare as comparing
    from vtok_fast.bench import report

    found = comparing.compare(report.load(before), report.load(after))
    if as_json:
        print(
            json.dumps(
                {
                    "changes": [c.as_json() for c in found.changes],
                    "only_before": found.only_before,
                    "only_after": found.only_after,
                    "remarks": found.remarks,
                },
                indent=1,
            )
        )
    else:
        from rich.console import Console

        console = Console(width=max(140, Console().width))
        for remark in found.remarks:
            console.print(f"note: {remark}", markup=False)
        if (table := comparing.table(found, changed=changed)).row_count:
            console.print(table)
        console.print(
            f"{report.counted(len(found.changes))} in both, {len(found.regressions)} slower; "
            f"{len(found.only_before)} "
            f"only before, {len(found.only_after)} only after"
        )
    raise typer.Exit(int(bool(found.regressions)))


def _list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from vtok_fast.bench import report

    table = Table("section", "case", "dtype", "device")
    for row in rows:
        table.add_row(row["section"], row["case"], row["dtype"], row["device"])
    console = Console()
    console.print(table)
    for name in dict.fromkeys(row["section"] for row in rows):
        console.print(
            f"{name}: beside {next(row['peers'] for row in rows if row['section'] == name)}", markup=False
        )
    console.print(report.counted(len(rows)))
