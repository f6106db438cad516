"""How a video would be read, and why: ``vtok-fast probe``."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vtok_fast.io.files import write_atomically
from vtok_fast.io.video import Reading, VideoError, color, hdr, open_video
from vtok_fast.io.video.container import choose, declared_bytes, is_picture, open_container, said
from vtok_fast.io.video.errors import pyav
from vtok_fast.io.video.filters import is_interlaced
from vtok_fast.io.video.geometry import turns

NAMED = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128)}
SHEET = 12  # frames of a contact sheet
RANGES = {1: "limited", 2: "full"}
PRIMARIES = {1: "BT.709", 4: "BT.470 M", 5: "BT.601 (625 lines)", 6: "BT.601 (525 lines)", **hdr.WIDE}
TRANSFERS = {1: "BT.709", 6: "BT.601", 13: "sRGB", 14: "BT.2020", 15: "BT.2020", hdr.PQ: "PQ", hdr.HLG: "HLG",
             **hdr.LIGHT}  # fmt: skip


def rgb_of(text: str) -> tuple[int, int, int]:
    """(R, G, B) of black, white, gray or RRGGBB. Raises ValueError."""
    if text.lower() in NAMED:
        return NAMED[text.lower()]
    digits = text.removeprefix("#")
    try:
        if len(digits) != 6:
            raise ValueError
        red, green, blue = bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"background={text!r}: expected {', '.join(NAMED)} or RRGGBB") from None
    return red, green, blue


def probe(path: str | os.PathLike, **reading: Any) -> dict[str, Any]:
    """What the reader would do with a file, as JSON values: "readable", or "error", why it is not; "streams",
    with what becomes of each; "size" and how it comes about; "times"; "colors"; "notes", in words.

    reading: the fields of `vtok_fast.io.video.Reading`. Raises FileNotFoundError, and VideoError for a file
    that is not a video.
    """
    path, options = Path(path), Reading(**reading)
    container = open_container(path)
    try:
        found: dict[str, Any] = {"path": str(path), "container": container.format.name}
        found["streams"] = [_stream(stream) for stream in container.streams]
        try:
            stream = choose(container, path, options.stream)
        except VideoError as error:
            return found | {"readable": False, "error": str(error), "notes": []}
        for index, other in enumerate(container.streams):
            found["streams"][index]["use"] = _use(other, stream)
        crop = said(container, stream).crop
        frame = _first(container, stream)
        facts = {} if frame is None else _facts(frame, stream, crop, options)
    finally:
        container.close()
    declared, size = declared_bytes(path), path.stat().st_size
    if declared is not None and declared > size:
        facts.setdefault("notes", []).append(f"the file is cut off after {size} of {declared} bytes")
    try:
        with open_video(path, **reading) as source:
            found |= {"readable": True, "size": [source.height, source.width]}
            found["times"] = {"fps": source.fps, "frames": source.count or None}
            found["times"] |= _times(source)
    except VideoError as error:
        found |= {"readable": False, "error": str(error)}
    return found | facts


def _stream(stream: Any) -> dict[str, Any]:
    context = stream.codec_context
    facts = {"index": stream.index, "type": stream.type, "codec": context.name if context else None}
    if stream.type == "video" and context is not None:
        facts |= {"height": stream.height, "width": stream.width, "format": context.pix_fmt}
        facts["rate"] = str(stream.average_rate) if stream.average_rate else None
    return facts


def _use(stream: Any, chosen: Any) -> str:
    if stream.index == chosen.index:
        return "read"
    if stream.type != "video":
        return f"dropped: {stream.type}"
    return "dropped: cover art" if is_picture(stream) else "dropped: another video stream (--stream)"


def _first(container: Any, stream: Any) -> Any:
    """The first frame, or None if none can be decoded."""
    try:
        return next(iter(container.decode(stream)), None)
    except (pyav().error.FFmpegError, OSError):
        return None


def _facts(frame: Any, stream: Any, crop: tuple[int, int, int, int], options: Reading) -> dict[str, Any]:
    """What is done to a frame, as values and in words."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    side = frame.side_data.get("DISPLAYMATRIX")
    notes = []
    try:
        swap, flip = turns(bytes(side) if side is not None else None)
    except VideoError as error:
        swap, flip = False, (False, False)
        notes.append(str(error))
    matrix, spread = color.guess(frame)
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    tagged = int(frame.colorspace) not in (0, 2, 3) or matrix == 0
    interlaced = is_interlaced(frame, stream)
    shape = {
        "coded": [frame.height, frame.width],
        "crop": dict(zip(("top", "bottom", "left", "right"), crop)),
        "pixel_aspect": str(aspect),
        "transpose": swap,
        "flip": {"vertical": flip[0], "horizontal": flip[1]},
        "interlaced": interlaced,
    }
    colors = {
        "format": frame.format.name,
        "bits": color.depth(frame),
        "matrix": color.MATRICES.get(matrix, color.REFUSED.get(matrix, "RGB")),
        "matrix_tagged": tagged,
        "range": RANGES[spread],
        "range_tagged": int(frame.color_range) in RANGES,
        "primaries": PRIMARIES.get(primaries),
        "transfer": TRANSFERS.get(transfer),
        "alpha": color.has_alpha(frame) or stream.metadata.get("alpha_mode") == "1",
    }
    if any(crop):
        notes.append("the container crops {} rows above, {} below, {} columns left, {} right".format(*crop))
    if aspect != 1:
        notes.append(
            f"pixels are {aspect} times as wide as high: the width is multiplied by it, the height stays"
        )
    if swap or any(flip):
        notes.append(f"the display matrix {_turned(swap, flip)} it")
    if interlaced:
        how = (
            f"{options.deinterlacer} makes whole frames"
            if options.deinterlacer
            else "refused without --deinterlace"
        )
        notes.append(f"it is interlaced: {how}")
    if not tagged:
        notes.append(f"the matrix is not tagged: {colors['matrix']} is taken, by its {frame.height} lines")
    if transfer in (hdr.PQ, hdr.HLG):
        done = "tone-mapped to BT.709" if options.hdr == "tonemap" else "refused (--hdr error)"
        notes.append(f"it is HDR ({colors['transfer']}): {done}")
    elif primaries in hdr.WIDE:
        notes.append(
            f"its primaries are those of {hdr.WIDE[primaries]}: converted to BT.709, what is outside clipped"
        )
    if colors["alpha"]:
        notes.append("transparency is over RGB {},{},{}".format(*options.background))
    return {"shape": shape, "colors": colors, "notes": notes}


def _turned(swap: bool, flip: tuple[bool, bool]) -> str:
    """In words, clockwise."""
    names = {
        (False, (True, True)): "turns by 180 degrees",
        (False, (False, True)): "mirrors left to right",
        (False, (True, False)): "mirrors top to bottom",
        (True, (False, True)): "turns by 90 degrees clockwise",
        (True, (True, False)): "turns by 90 degrees counterclockwise",
        (True, (False, False)): "mirrors along the main diagonal",
        (True, (True, True)): "mirrors along the other diagonal",
    }
    return names[swap, flip]


def _times(source: open_video) -> dict[str, Any]:
    """Of the first frames: when they are shown, and whether evenly."""
    pictures = [picture for picture, _ in zip(source.frames(), range(SHEET))]
    times = [picture.pts * picture.base for picture in pictures]
    steps = [after - before for before, after in zip(times, times[1:])]
    even = not steps or max(steps) - min(steps) <= 2 * pictures[0].base
    return {"first": float(times[0]), "even": even, "base": str(pictures[0].base)}


def contact_sheet(path: str | os.PathLike, output: str | os.PathLike, **reading: Any) -> None:
    """Draw up to twelve frames, spread over the video, as they are read, into a PNG file."""
    from matplotlib.figure import Figure

    with open_video(path, **reading) as source:
        kept: list[tuple[float, np.ndarray]] = []
        step, number = 1, 0
        for number, picture in enumerate(source.frames()):
            if number % step == 0:
                kept.append((picture.time, np.stack(picture.pixels(160), -1)))
                if len(kept) == 2 * SHEET:  # every other one: the memory stays that of one sheet
                    kept, step = kept[::2], 2 * step
    shown = kept[:: -(-len(kept) // SHEET)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    height, width = shown[0][1].shape[:2]
    figure = Figure(figsize=(2.5 * columns, (2.5 * height / width + 0.35) * rows), layout="constrained")
    for axes in (plots := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, (time, image) in zip(plots.flat, shown):
        axes.imshow(image)
        axes.set_title(f"{time:.3f} s", fontsize=8)
    write_atomically(output, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def show(found: dict[str, Any]) -> None:
    """Print what `probe` found."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "stream", "kind", "codec", "what becomes of it", title=f"{found['path']} ({found['container']})"
    )
    for stream in found["streams"]:
        kind = stream["type"]
        if "height" in stream:
            kind += f", {stream['height']}x{stream['width']} {stream['format']}"
        table.add_row(str(stream["index"]), kind, str(stream["codec"]), stream.get("use", ""))
    console = Console()
    console.print(table)
    if found["readable"]:
        times, colors = found["times"], found["colors"]
        spacing = "evenly spaced" if times["even"] else "unevenly spaced, each kept"
        console.print(
            f"frames of {found['size'][0]}x{found['size'][1]}, {times['fps']:.6g} per second, {spacing}"
        )
        console.print(f"colors: {colors['format']}, {colors['matrix']}, {colors['range']} range")
    else:
        console.print(f"not readable: {found['error']}", markup=False, soft_wrap=True)
    for note in found.get("notes", ()):
        console.print(f"- {note}", markup=False, soft_wrap=True)
