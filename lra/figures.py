"""What all pictures of the project share: type, colours, line styles, and files that depend on their numbers alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C00")
"""Okabe and Ito's palette, told apart by the colour-blind too; its yellow darkened, to be seen on paper."""

LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>"

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "lra",  # with no date below: the same file for the same numbers
    "svg.fonttype": "path",
}


def style() -> Any:
    """Context in which a picture is made and saved."""
    return mpl.rc_context(_STYLE)


def line(at: int) -> dict[str, Any]:
    """Colour, dashes and marker of the curve number `at`."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "linestyle": LINES[(at + at // len(COLOURS)) % len(LINES)],  # not in step with the colours
        "marker": MARKERS[at % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, the same bytes for the same numbers; inside `style()`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
