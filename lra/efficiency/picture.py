"""Time and memory of one sequence against its length, with the slope of each curve."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from lra.efficiency.table import shape_name
from lra.figures import lengths
from lra.figures.lengths import Panel
from lra.figures.rows import FOLDER, Picture
from lra.figures.style import looks, slug

PANELS = (
    ("fwd_bwd_ms", "forward + backward (ms a sequence)"),
    ("peak_mem_mib", "peak memory (MiB a sequence)"),
)
SHAPE = ["device", "heads", "head_dim", "tokens", "dtype"]


def draw(results_dir: str | Path, frame: pd.DataFrame) -> Iterable[Picture]:
    """One picture for each device and shape with something measured: a row of panels without and one with a mask."""
    shapes: Any = frame[frame["fwd_bwd_ms"] > 0].groupby(SHAPE)
    for (device, heads, head_dim, tokens, dtype), rows in shapes:
        shape = shape_name(heads, head_dim, tokens, dtype)
        path = Path(results_dir, FOLDER, f"efficiency-{slug(device)}-{shape}")
        title = f"{device}, H = {heads}, D = {head_dim}, {dtype}, {tokens:,} tokens a call"
        measured = [(column, label) for column, label in PANELS if any(rows[column] > 0)]  # a CPU tells no memory
        panels = [_panels(rows[rows["masked"] == masked], masked, measured) for masked in sorted(set(rows["masked"]))]
        lengths.figure(path, title, panels, looks(rows["attention"]))
        yield Picture(path, f"Time and memory against length: {title}", lengths.CAPTION)


def _panels(rows: pd.DataFrame, masked: bool, measured: list[tuple[str, str]]) -> list[Panel]:
    title = "with a padding mask" if masked else "no mask"
    return [Panel(title, label, _curves(rows, column)) for column, label in measured]


def _curves(rows: Any, column: str) -> dict[str, list[tuple[float, float]]]:
    """(length, value of a sequence) by attention, of what was measured."""
    measured: Any = rows[rows[column] > 0].sort_values("length")
    return {
        str(name): list(zip(curve["length"], curve[column] / curve["batch"], strict=True))
        for name, curve in measured.groupby("attention")
    }
