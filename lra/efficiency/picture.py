"""Time and memory of one sequence against its length, with the slope of each curve."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lra.efficiency import table
from lra.efficiency.cases import BASELINE
from lra.figures import line, save, style

PANELS = (
    ("fwd_bwd_ms", "forward + backward (ms a sequence)", "time_slope"),
    ("peak_mem_mib", "peak memory (MiB a sequence)", "memory_slope"),
)
SHAPE = ["device", "heads", "head_dim", "dtype"]


def draw(results_dir: str | Path, frame: pd.DataFrame) -> list[Path]:
    """One picture for each device and shape with something measured: a row of panels without and one with a mask."""
    paths = []
    shapes: Any = frame[frame["fwd_bwd_ms"] > 0].groupby(SHAPE)
    for (device, heads, head_dim, dtype), rows in shapes:
        path = table.directory(results_dir, device) / f"efficiency-h{heads}-d{head_dim}-{dtype}"
        tokens = int((rows["batch"] * rows["length"]).max())
        _draw(path, f"{device}, H = {heads}, D = {head_dim}, {dtype}, {tokens:,} tokens a call", rows)
        paths.append(path)
    return paths


def _draw(path: Path, title: str, rows: Any) -> None:
    masks = sorted(set(rows["masked"]))
    names = sorted(set(rows["attention"]), key=lambda name: (name != BASELINE, name))
    slopes = table.slopes(rows).set_index(["attention", "masked"])
    with style():
        figure = Figure(figsize=(11, 3.9 * len(masks) + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=9)
        grid = figure.subplots(len(masks), len(PANELS), squeeze=False)
        for axes_row, masked in zip(grid, masks, strict=True):
            for axes, (column, label, slope) in zip(axes_row, PANELS, strict=True):
                curves = rows[rows["masked"] == masked]
                for at, name in enumerate(names):
                    curve = curves[(curves["attention"] == name) & (curves[column] > 0)]
                    if len(curve):
                        _curve(axes, at, name, curve, column, slopes.loc[(name, masked), slope])
                _finish(axes, label, "with a padding mask" if masked else "no mask", curves["length"])
        save(figure, path)


def _curve(axes: Any, at: int, name: str, curve: pd.DataFrame, column: str, slope: Any) -> None:
    label = name if pd.isna(slope) else f"{name} ({slope:.2f})"
    axes.plot(curve["length"], curve[column] / curve["batch"], label=label, **line(at))


def _finish(axes: Any, label: str, title: str, lengths: pd.Series) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(color="0.9", linewidth=0.6)
    if axes.lines:
        axes.legend(title="log-log slope in brackets", fontsize=6.5, title_fontsize=6.5, loc="center left",
                    bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3.5)  # fmt: skip
