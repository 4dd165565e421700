"""What was published, drawn like ours but apart from it: other hardware, other settings, so ratios and slopes only."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from lra import literature
from lra.figures import lengths, tradeoff
from lra.figures.rows import FOLDER, Picture
from lra.figures.style import Look, looks

KIN = {
    "Transformer": "softmax", "Transformer (softmax)": "softmax", "PyTorch Attention": "softmax",
    "Linear Transformer": "linear", "Performer": "performer", "Linformer": "linformer", "Linformer-256": "linformer",
    "Nystromformer": "nystromformer", "Nystromformer-64": "nystromformer", "Local Attention": "local",
}  # fmt: skip
"""Published rows that are a method of ours, and so look like it; the others are grey."""

STRANGER = ("#7F7F7F", "o")

TRADEOFF = (
    ("LRA-T2", "Tay+ LRA (ICLR 2021", ("4096",), "LRA (Tay+ 2020), {hardware}\nspeed and memory on Text, 4,096 tokens"),
    (
        "Skyformer-T2",
        "Chen+ Skyformer (NeurIPS 2021) Table 1",
        (),
        "Skyformer (Chen+ 2021), {hardware}\nmean of 5 tasks",
    ),
)
"""Table of efficiency, source of the accuracies, tasks or lengths (none: the geometric mean over all), and title."""

LENGTHS = (
    ("FlashAttention (Dao+ 2022), {hardware}", "FA-T20", "fwd+bwd_time", "forward + backward (ms a call)"),
    ("FlashAttention (Dao+ 2022), {hardware}", "FA-T21", "memory", "memory (MB a call)"),
    ("Nyströmformer (Xiong+ 2021), {hardware}", "Nystrom-T1", "time", "inference (ms a sequence)"),
    ("Nyströmformer (Xiong+ 2021), {hardware}", "Nystrom-T1", "memory", "memory (MB a sequence)"),
)
"""Title, table, metric, axis label; two in a row."""

SPEED, MEMORY = ("train_speed", "train_time"), "peak_memory"

TRADEOFF_CAPTION = (
    "Published trade-offs, the twin of ours: average accuracy over the five LRA tasks against speed relative to the "
    "same paper's softmax Transformer on its hardware; the area is peak memory relative to it. Ratios compare, "
    "values on other hardware do not."
)
LENGTHS_CAPTION = "Published times and memory, the twin of ours: only the slopes compare across hardware. "


def draw_tradeoff(results_dir: Path) -> Picture:
    """`tradeoff-published`: LRA's and Skyformer's own rows, hollow."""
    shown = [_panel(*entry) for entry in TRADEOFF]
    path = Path(results_dir, FOLDER, "tradeoff-published")
    looked = known(disc.name for panel in shown for disc in panel.discs)
    title = "published, relative to the softmax Transformer of the same table"
    tradeoff.figure(path, title, shown, looked, hollow=True)
    return Picture(path, "Accuracy, speed and memory: published", TRADEOFF_CAPTION)


def draw_lengths(results_dir: Path) -> Picture:
    """`efficiency-published`: FlashAttention's and Nyströmformer's tables of time and memory against length."""
    shown = [_curves(*entry) for entry in LENGTHS]
    path = Path(results_dir, FOLDER, "efficiency-published")
    looked = known(name for panel in shown for name in panel.curves)
    lengths.figure(path, "published", [shown[:2], shown[2:]], looked)
    return Picture(path, "Time and memory against length: published", LENGTHS_CAPTION + lengths.CAPTION)


def relative(table: str, places: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Model to speed and memory relative to the table's own Transformer; geometric means over places, () for all."""
    rows = [row for row in literature.efficiency(table) if not places or row.place in places]
    found = {}
    for model in sorted({row.model for row in rows}):
        mine = [row for row in rows if row.model == model]
        speed = [row.relative for row in mine if row.metric in SPEED]
        memory = [row.relative for row in mine if row.metric == MEMORY]
        found[model] = _mean(speed), _mean(memory)
    return found


def _panel(table: str, source: str, places: tuple[str, ...], title: str) -> tradeoff.Panel:
    """The models of a table whose average accuracy the same paper gives."""
    averages = {row.model: row.average for row in literature.accuracies(source) if row.average is not None}
    discs = [
        tradeoff.Disc(model, speed, averages[model], memory)
        for model, (speed, memory) in relative(table, places).items()
        if model in averages
    ]
    return tradeoff.Panel(
        title.format(hardware=hardware(table)), "average accuracy, 5 tasks (%)",
        "training speed (softmax Transformer = 1)", "×", discs,
    )  # fmt: skip


def _curves(title: str, table: str, metric: str, label: str) -> lengths.Panel:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in literature.efficiency(table):
        if row.metric == metric and row.place.isdecimal() and row.value is not None:
            points.setdefault(row.model, []).append((int(row.place), row.value))
    curves = {model: sorted(curve) for model, curve in points.items()}
    return lengths.Panel(title.format(hardware=hardware(table)), label, curves)


def hardware(table: str) -> str:
    """What a published table was measured on."""
    return " / ".join(sorted({row.hardware for row in literature.efficiency(table)}))


def known(models: Iterable[str]) -> dict[str, Look]:
    """The look of a published model: that of our method, or grey with dashes of its own."""
    models = sorted(set(models))
    ours = looks(KIN[model] for model in models if model in KIN)
    strangers = [model for model in models if model not in KIN]
    return {model: ours[KIN[model]] for model in models if model in KIN} | {
        model: Look(*STRANGER, at) for at, model in enumerate(strangers)
    }


def _mean(ratios: list[float | None]) -> float:
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else math.nan
