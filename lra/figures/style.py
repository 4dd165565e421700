"""What all pictures share: type, the look of an attention, and files that depend on their numbers alone."""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lra.record import write_text

FAMILIES = {
    "softmax": ("#000000", "o"),
    "adamra": ("#D55E00", "D"),
    "mra": ("#0072B2", "s"),
    "combiner": ("#009E73", "^"),
    "lln": ("#E69F00", "v"),
    "routing": ("#CC79A7", "P"),
    "linear": ("#56B4E9", "X"),
    "performer": ("#56B4E9", "<"),
    "linformer": ("#56B4E9", ">"),
    "nystromformer": ("#56B4E9", "p"),
    "local": ("#56B4E9", "h"),
    "none": ("#595959", "d"),
}
"""Colour and marker of a family, the same in every picture: Okabe and Ito's palette, told apart by the colour-blind
too. The classic rows share a colour and differ in marker and dashes."""

OTHERS = ("#5D3A1A", "*")
"""Anybody's own attention; the palette's yellow is not to be seen on paper."""

DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
PLACES = {"mra_s": 1, "lln_diag": 1, "combiner_logsparse": 1, "combiner_axial": 2}
PLACES |= {"performer": 1, "linformer": 2, "nystromformer": 3, "local": 4}
"""Which dashes a variant has; one that is not named here takes the next that its family has left in the picture."""

QUIET = "0.45"
"""The grey of what is beside the data: leader lines, the class prior."""

SIZES = {"title": 9.0, "note": 7.0}
"""Of type beside the 8 points of axes, in points."""

COORDINATES = re.compile(r'\b(?:d|x|y)="[^"]*"')
DIGITS = re.compile(r"(?<=\.\d\d)\d+")
"""Behind a hundredth of a point nothing can be seen."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "lra",  # with no date below: the same file for the same numbers
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """How one attention is drawn: the plain form of a family in solid lines, its variants in dashes."""

    colour: str
    marker: str
    place: int = 0

    @property
    def pale(self) -> tuple[float, float, float]:
        """The colour on its way to white, for bands."""
        red, green, blue = (1 - 0.4 * (1 - part) for part in to_rgb(self.colour))
        return red, green, blue

    def line(self) -> dict[str, Any]:
        """Of a curve."""
        return {
            "color": self.colour,
            "linestyle": DASHES[self.place % len(DASHES)],
            "linewidth": 1.3,
            "marker": self.marker,
            "markersize": 3.5,
        }

    def mark(self, *, hollow: bool = False) -> dict[str, Any]:
        """Of a single mark; a hollow one stands for a published value."""
        return {
            "linestyle": "none",
            "color": self.colour,
            "marker": self.marker,
            "markersize": 5,
            "markerfacecolor": "white" if hollow else self.colour,
            "markeredgewidth": 0.9,
        }


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each attention of a picture; of `mra`, `mra+1f0c9e2b*` and `mra (blocks_per_row=4)` alike.

    Families, and the variants in `PLACES`, look the same in every picture. Forms of one family never look alike.
    """
    found: dict[str, Look] = {}
    taken: dict[str, set[int]] = {}
    for name in sorted(set(names), key=lambda name: (name != _base(name), name)):
        family = _family(name)
        used = taken.setdefault(family, set())
        fixed = PLACES.get(name, 0 if name in FAMILIES else None)
        place = next(n for n in range(len(used) + 9) if n not in used and n not in _kept(family))
        used.add(place if fixed is None else fixed)
        found[name] = Look(*FAMILIES.get(family, OTHERS), place if fixed is None else fixed)
    return found


def _kept(family: str) -> set[int]:
    """The dashes that belong to the family's named forms."""
    named = {place for name, place in PLACES.items() if _family(name) == family}
    return named | ({0} if family in FAMILIES else set())


def _base(name: str) -> str:
    return re.split(r"[+*(]", name)[0].strip()


def _family(name: str) -> str:
    base = _base(name)
    return next((stem for stem in FAMILIES if base == stem or base.startswith(f"{stem}_")), "")


def style() -> Any:
    """Context in which a picture is made and saved."""
    return mpl.rc_context(_STYLE)


def plain_log(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers, the more of them the shorter it is; its data reach from low to high."""
    subs = (1,) if high > 100 * low else (1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def slug(*parts: str) -> str:
    """Words as part of a file name: `small-published-nvidia-h100-80gb-hbm3`."""
    return "-".join(re.sub(r"[^a-z0-9_]+", "-", part.lower()).strip("-") for part in parts)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, the same bytes for the same numbers; inside `style()`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path.with_suffix(".svg"), COORDINATES.sub(lambda found: DIGITS.sub("", found[0]), svg.getvalue()))
