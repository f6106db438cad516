"""The commands on video files: ``probe``, ``tokenize``, ``detokenize`` and ``score``. Whatever needs torch is
imported inside them, after their arguments have been looked at."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok_fast.commands import names
from vtok_fast.commands.options import Force, Json, device_of, dtype_of, pixels, print_json
from vtok_fast.io.paths import check_distinct

Checkpoint = Annotated[
    Path | None, typer.Option(help="The model's weights. Without: the demo weights of vidtok/tiny.")
]
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
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Print how a video would be read: streams, size, rotation, times, colors, and what is dropped and
    why."""
    names.check_input("video", video)
    if plot is not None:
        names.check_output(plot, (".png",), force=force, what="a PNG picture")
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


def tokenize(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    output: Output,
    model: Annotated[
        str,
        typer.Option(
            help="System and configuration, as in vidtok/fsq_causal_488_32768.",
            autocompletion=names.complete_model,
        ),
    ] = names.DEMO_MODEL,
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
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the tokens of a video, in memory for one window. A run that was stopped goes on where it was."""
    names.check_input("video", video)
    names.check_model(model, checkpoint)
    names.check_input("checkpoint", checkpoint)
    scaled = None if size is None else pixels(size)
    check_distinct(output, video=video, checkpoint=checkpoint)
    names.check_output(output, names.TOKENS, force=force, what="tokens")
    from vtok_fast.commands.tokenize import tokenize as write_tokens

    reading = _reading(fps, deinterlace, deinterlacer, hdr, background, on_error, stream)
    chosen, weights = _model(device, dtype, accelerate, model, checkpoint)
    began = time.perf_counter()
    with _progress(as_json, "windows", output) as progress:
        windows = write_tokens(
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
    facts = _facts(video, output, windows, scaled, reading, time.perf_counter() - began)
    if as_json:
        print_json(facts)
    else:
        _say(facts, demo_weights=checkpoint is None)


def _facts(
    video: Path, output: Path, windows: Any, scaled: Any, reading: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What ``tokenize`` has done, as it prints it."""
    from vtok_fast.io.video import open_video
    from vtok_fast.io.video.geometry import fit

    count = sum(
        int((tokens.data >= 0).sum()) if tokens.latents is None else tokens.data[:, 0].numel()
        for tokens in windows
    )
    with open_video(video, **reading) as source:
        fitted = fit(source.height, source.width, scaled)
    frames, size, stored = windows.info["frames"], list(windows[0].video_shape[1:]), output.stat().st_size
    return {
        "output": str(output),
        "model": windows.model,
        "frames": frames,
        "fps": windows.info["fps"],
        "size": size,
        "scaled_to": list(fitted) if scaled is None or isinstance(scaled, int) else size,
        "windows": len(windows),
        "tokens": count,
        "bytes": stored,
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 2),
        "ratio": round(3 * frames * size[0] * size[1] / stored, 2),
        "left_out": sum(one["count"] for one in windows.info.get("left_out", ())),
        "concealed": sum(one["count"] for one in windows.info.get("concealed", ())),
    }


def _say(facts: dict[str, Any], *, demo_weights: bool) -> None:
    height, width = facts["size"]
    duration = facts["frames"] / facts["fps"]
    print(
        f"{facts['output']}: {facts['frames']} frames of {height}x{width} at {facts['fps']:.4g} fps "
        f"({duration:.1f} s) as {facts['tokens']:,} tokens of {facts['model']}, {facts['bytes']:,} bytes\n"
        f"{facts['seconds']:.1f} s, {facts['frames_per_second']:.1f} frames per second; "
        f"{facts['bytes'] * 8 / duration / 1000:.1f} kbit per second of video, "
        f"{facts['ratio']:.1f} times smaller than its pixels as 8-bit RGB"
    )
    if demo_weights:
        print(f"These are the demo weights of {facts['model']}, trained briefly: good for trying things out")
    if facts["scaled_to"] != facts["size"]:
        whole = "x".join(map(str, facts["scaled_to"]))
        print(
            f"Frames of {whole} were cut to {height}x{width}, which the model's blocks divide evenly; "
            f"--size HxW chooses another size"
        )
    for name, what in (("left_out", "left out"), ("concealed", "concealed")):
        if facts[name]:
            print(f"{facts[name]} frames were {what}; the file of tokens lists them")


def detokenize(
    tokens: Annotated[Path, typer.Argument(help="What tokenize wrote.")],
    output: Output,
    model: Annotated[
        str | None,
        typer.Option(help="Default: the one that made the tokens.", autocompletion=names.complete_model),
    ] = None,
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
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the video (MP4) of a file of tokens, in memory for one window. A run that was stopped goes on
    where it was."""
    names.check_input("tokens file", tokens)
    names.check_input("checkpoint", checkpoint)
    if model is not None:
        names.check_model(model, checkpoint)
    check_distinct(output, tokens=tokens, checkpoint=checkpoint)
    names.check_output(output, names.MP4, force=force, what="a video (MP4)")
    from vtok_fast.commands.detokenize import detokenize as write_frames
    from vtok_fast.io.token_windows import TokenWindows

    windows = TokenWindows(tokens)
    config = windows.config if model is None else None
    chosen, weights = _model(device, dtype, accelerate, model or windows.model, checkpoint, config)
    began = time.perf_counter()
    with _progress(as_json, "windows", output) as progress:
        write_frames(tokens, output, chosen, weights=weights, any_weights=any_weights, progress=progress)
    seconds = time.perf_counter() - began
    frames = windows.info.get("frames") or sum(tokens.video_shape[0] for tokens in windows)
    facts = {
        "output": str(output),
        "model": windows.model,
        "frames": frames,
        "fps": windows.info.get("fps", 25.0),
        "size": list(windows[0].video_shape[1:]),
        "bytes": output.stat().st_size,
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 2),
    }
    if as_json:
        print_json(facts)
    else:
        print(
            f"{output}: {frames} frames of {'x'.join(map(str, facts['size']))} at {facts['fps']:.4g} fps, "
            f"{facts['bytes']:,} bytes\n{seconds:.1f} s, {frames / seconds:.1f} frames per second"
        )


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
    names.check_input("video", original)
    names.check_input("video", reconstruction)
    names.check_input("tokens file", tokens)
    names.check_input("network", fvd_network)
    scaled = None if size is None else pixels(size)
    from vtok_fast.commands.score import score as measure

    reading = _reading(fps, deinterlace, deinterlacer, hdr, background, on_error, stream)

    with _progress(as_json, "frames") as progress:
        found = measure(
            original,
            reconstruction,
            tokens=tokens,
            size=scaled,
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
        "bits_per_pixel": ("bits per pixel, tokens", "{:.4f}".format),
        "file_bits_per_pixel": ("bits per pixel, file", "{:.4f}".format),
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
    from vtok_fast.commands.load_model import fingerprint, load_model

    chosen, where = dtype_of(dtype), device_of(device)
    model = load_model(*names)
    weights = fingerprint(model)
    model.to(where, chosen)
    if accelerate:  # `vtok-fast check --models` is what measures the swaps of our own models
        vtok_fast.accelerate(model, check=False)
    return model, weights


@contextlib.contextmanager
def _progress(
    quiet: bool, unit: str, resumed: Path | None = None
) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error, as a function of what is done and of how much there is (None: unknown). A
    KeyboardInterrupt within says what is done, and of work that goes on (``resumed``: its output), how."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    seen: tuple[int, int | None] = (0, None)

    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int | None) -> None:
            nonlocal seen
            seen = done, total
            bar.update(task, completed=done, total=total)

        try:
            yield progress
        except KeyboardInterrupt:
            done = f"{seen[0]}{f' of {seen[1]}' if seen[1] else ''} {unit} are done"
            if resumed is None:
                raise KeyboardInterrupt(f"{done}; nothing is kept of them") from None
            kept = f"; they lie in {resumed}.parts, and the same command goes on from there"
            raise KeyboardInterrupt(done + (kept if seen[0] else "; the same command starts again")) from None
