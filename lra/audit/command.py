"""From the command line of `scripts/audit.py` to a table of shortcuts and control, a record of it, and `audit.csv`."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from lra import cli, provenance, stats, tasks
from lra import config as configuration
from lra.audit import control, picture, shortcuts
from lra.audit.answers import apart, of_cells
from lra.audit.images import first, grey
from lra.errors import UserError
from lra.record import FILENAME, SCHEMA, Record, write_json, write_text
from lra.tasks.pathfinder import Pathfinder

CONF = Path(__file__).parents[2] / "conf"

USAGE = """\
python scripts/audit.py [task=pathfinder] [task.contour_length=14] [key=value ...]

Can Pathfinder's labels be guessed without following a contour, and can they be learned at all? Prints pixel
statistics, guesses from shortcuts (near 50 % on the hard level, but 65 % from the markers' places where
task.drawing=published), from the first dashes of three ends alone (71 to 75 % from two of each) and a small CNN (95 %
where task.drawing=even). Of the CNN, and of the cells of protocol and budget in results_dir that were trained on these
images, it says how many answers are right where the markers' places mislead, and where they do not. Writes record and
picture below results_dir/audit, and results_dir/audit.csv. Keys of its own:
  control.epochs=N   passes of the CNN over the training images (1 to 2 minutes on a GPU); 0 leaves it out, or as it was
All other keys are those of run.py, as far as they name data: protocol, data.root, task.train_size, ..."""

FOLDER = "audit"
"""Where the records lie below the results folder."""

AUDITED = 4000
"""Images that a shortcut is fitted on, and as many that it is tested on; the markers of each are drawn once more."""

CONTROL = "convolutional network"

PUBLISHED = {
    "black pixels": 66,
    "grey value, mean": 20,
    "grey value, deviation": 51,
    "brightest pixel, least": 255,
    "label 1": 50.3,
    "linear probe": 49,
    "marker distance": 54.5,
    "marker places": 67,
    "flood fill": 52,
    CONTROL: 80,
}
"""Of 6,900 images of the published generator's hard level at 32 × 32, guesses fitted on one half of them; a network is
known to reach at least so much."""

COLUMNS = (
    "task",
    "contour_length",
    "drawing",
    "data_digest",
    "audit",
    "value",
    "ci95_low",
    "ci95_high",
    "items",
    "published",
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 2 a mistake in the command, which is one line."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        config, task, recipe = parse(arguments)
        record = audit(config, task, recipe)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(cli.explain(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    path = _folder(config, record["data"]["digest"]) / FILENAME
    if not recipe.epochs:
        _keep_control(record, path)
    write_json(path, record)
    path = refresh(Path(config.results_dir))
    show(record, Console())
    print(path)
    return 0


def _keep_control(record: Record, path: Path) -> None:
    """Put the network of the earlier audit in `path`, of the same images, into one that trained none."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if trained := earlier.get("control"):
        record["control"] = {key: earlier[key] for key in ("code", "versions", "device")} | trained
        record["rows"] += [row for row in earlier["rows"] if row["audit"].startswith(CONTROL)]


def _folder(config: configuration.Config, digest: str) -> Path:
    """Where the record and the picture of an audit lie."""
    return Path(config.results_dir, FOLDER, f"{config.task['name']}-{digest[:12]}")


def parse(arguments: Sequence[str]) -> tuple[configuration.Config, Pathfinder, control.Recipe]:
    """The configuration, the task and the network's recipe; UserError for what is not possible."""
    recipe, overrides = control.Recipe(), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "control.epochs":
            overrides.append(argument)
        elif value.isdecimal():
            recipe = replace(recipe, epochs=int(value))
        else:
            raise UserError(f"{argument} is not possible; it must be an integer of at least 0")
    if not any(override.startswith("task=") for override in overrides):
        overrides.append("task=pathfinder")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = configuration.load(compose("config", overrides=overrides))
    task = tasks.build(config.task["name"], **config.task_options)
    if not isinstance(task, Pathfinder):
        known = (name for name in tasks.names() if isinstance(tasks.build(name), Pathfinder))
        raise UserError(f"task={task.name} has no audit; use one of {', '.join(known)}")
    return config, task, recipe


def audit(config: configuration.Config, task: Pathfinder, recipe: control.Recipe) -> Record:
    """Everything that is audited, as a record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    data = task.prepare(Path(config.data.root), progress=sys.stderr.isatty())
    prepared = time.perf_counter()
    train, test = (first(task, data, split, AUDITED) for split in ("train", "test"))
    rows = [{"audit": name, "value": value} for name, value in shortcuts.statistics(test).items()]
    rows = [{**row, "items": len(test.labels)} for row in rows]
    rows += [_accuracy(name, guess == test.labels) for name, guess in shortcuts.guesses(train, test)]
    told = None  # which test images the places of the markers tell
    if train.markers is not None:
        items = first(task, data, "test", data.counts["test"])
        picture.draw(_folder(config, data.digest) / "marker-places", f"{task.name}, drawing={task.drawing}", items)
        told = shortcuts.marker_places(train, items) == items.labels
        rows += [_accuracy(name, right) for name, right in of_cells(config, data.digest, "places", told)]
    audited = time.perf_counter()
    trained = None
    if recipe.epochs:
        splits = [(grey(task, data.splits[name].tokens), data.splits[name].labels) for name in ("train", "test")]
        trained = control.train(splits[0], splits[1], recipe, device, on_epoch=_say)
        rows.append(_accuracy(CONTROL, trained.right))
        if told is not None:
            rows += [_accuracy(name, right) for name, right in apart(CONTROL, trained.right, "places", told)]
    known = PUBLISHED if (task.resolution, task.contour_length) == (32, 14) else {}
    return {
        "schema": SCHEMA,
        "kind": "audit",
        "task": config.task,
        "data": {"digest": data.digest, "source": data.source, "counts": data.counts},
        "rows": [row | {"published": known.get(row["audit"])} for row in rows],
        "control": trained and {"recipe": asdict(recipe), **trained.summary()},
        "wall_s": {"data": prepared - started, "shortcuts": audited - prepared},
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "device": provenance.device_description(device),
    }


def _say(epochs: int, loss: float) -> None:
    print(f"network: {epochs} epochs, training loss {loss:.4f}", file=sys.stderr)


def _accuracy(name: str, right: np.ndarray) -> dict[str, Any]:
    correct, total = int(right.sum()), len(right)
    low, high = stats.wilson_interval(correct, total)
    return {
        "audit": name,
        "value": stats.accuracy(correct, total),
        "ci95_low": low,
        "ci95_high": high,
        "items": total,
    }


def refresh(results_dir: Path) -> Path:
    """Rebuild `audit.csv` from the records of all audits; returns its path."""
    rows = []
    for path in sorted((results_dir / FOLDER).rglob(FILENAME)):
        record = json.loads(path.read_text(encoding="utf-8"))
        common = {
            "task": record["task"]["name"],
            "contour_length": record["task"]["contour_length"],
            "drawing": _drawing(record["task"], record["data"]["source"]),
            "data_digest": record["data"]["digest"],
        }
        rows += [{**common, **row} for row in record["rows"]]
    path = results_dir / "audit.csv"
    write_text(path, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n"))
    return path


def _drawing(task: Mapping[str, Any], source: str) -> str:
    """Of generated images; before there was a choice they were even."""
    return task.get("drawing", "even") if source == "generate" else ""


def _kind(task: Mapping[str, Any], source: str) -> str:
    return f"{task['name']}, {source} {_drawing(task, source)}".rstrip()


def show(record: Record, console: Console) -> None:
    """The rows as a table: statistics first, then accuracies in per cent with their 95 % intervals."""
    task, data, wall = record["task"], record["data"], record["wall_s"]
    counts = " / ".join(f"{count:,}" for count in data["counts"].values())
    title = f"{_kind(task, data['source'])}, contours of {task['contour_length']}, {counts}, {data['digest'][:12]}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("audit", "measured", "95 % interval", "images", "published"):
        table.add_column(column, justify="left" if column == "audit" else "right", no_wrap=column != "audit")
    for row in record["rows"]:
        table.add_row(row["audit"], *_cells(row))
    console.print(table)
    console.print(f"data {wall['data']:.0f} s, shortcuts {wall['shortcuts']:.0f} s, {record['device']['name']}")
    if trained := record["control"]:
        size = f"{trained['parameters']:,} parameters, {trained['recipe']['epochs']} epochs"
        console.print(f"network: {size}, {trained['seconds']:.0f} s, training loss {trained['train_loss']:.3f}")


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    share = "ci95_low" in row
    published = "" if row["published"] is None else f"{row['published']:g}"
    if row["audit"] == CONTROL and published:
        published = f"over {published}"
    interval = f"{row['ci95_low']:.1f} to {row['ci95_high']:.1f}" if share else ""
    return f"{row['value']:.1f}", interval, f"{row['items']:,}", published
