"""The picture of a `Scope`: which keys each query sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vtok_fast.ops.scope_attention.csr import CSR

MOST_NAMES = 24  # along the axis; of more segments, some have none


def draw(
    csr: CSR,
    q_len: int,
    k_len: int,
    density: float,
    names: tuple[str, ...],
    where: str | os.PathLike | Any = None,
) -> Any:
    """See `Scope.plot`. Of tensors whose values are valid, with a name for each segment.

    Raises ImportError without matplotlib; OSError where the file cannot be written."""
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from vtok_fast.io.files import write_atomically

    path = Path(where) if isinstance(where, (str, os.PathLike)) else None
    axes: Any = where if path is None and where is not None else Figure(layout="constrained").subplots()
    q, r, ranges = (t.tolist() for t in csr)
    boxes = [
        Rectangle((lo, q[s]), hi - lo, q[s + 1] - q[s])
        for s in range(len(names))
        for lo, hi in ranges[r[s] : r[s + 1]]
    ]
    axes.add_collection(PatchCollection(boxes, facecolor="tab:blue", edgecolor="white", linewidth=0.5))
    axes.set(
        xlim=(0, max(k_len, 1)),
        ylim=(max(q_len, 1), 0),
        xlabel="keys",
        ylabel="queries",
        aspect="equal",
        title=f"{100 * density:.3g} % of the pairs",
    )
    named = [(q[s] + q[s + 1]) / 2 for s in range(len(names)) if q[s] < q[s + 1]]
    shown = [name for s, name in enumerate(names) if q[s] < q[s + 1]]
    step = -(-len(shown) // MOST_NAMES) or 1
    axes.set_yticks(named[::step], labels=shown[::step], fontsize=7)
    if path is not None:
        form = path.suffix[1:] or "png"
        write_atomically(path, lambda temporary: axes.figure.savefig(temporary, dpi=130, format=form))
    return axes
