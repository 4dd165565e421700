"""From the command line of `scripts/lens.py` to records, `lens.csv` and a picture."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import attention
from attention.registry import COMMON
from lra import cli
from lra import config as configuration
from lra.errors import UserError
from lra.lens.trained import read_cell
from lra.record import Cell

CONF = Path(__file__).parents[2] / "conf"

USAGE = """\
python scripts/lens.py [attention=NAME,...] [task=NAME] [key=value ...]

Writes lens.csv, records and a picture below results_dir. Keys of the lens:
  cell=DIR       look at a trained cell's layers (results/runs/.../seed0) instead of Gaussian q, k, v;
                 attention=... then adds others, untrained, on the same q, k, v
  length=N       tokens of Gaussian inputs; default the task's, at most 2048 (the matrix is N x N)
  sequences=N    sequences to average over; default 2
  scales=[...]   factors on q and k that the curves visit; default 0.35 to 2
All other keys are those of run.py; a comma between values looks at every one of them."""

SEEN = ("attention.", "model.", "task.")
"""Sections that change what the lens sees of an untrained attention; the others name no setting of its own."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for, beside the keys of `run.py`."""

    cell: Path | None = None
    length: int | None = None
    sequences: int = 2
    scales: tuple[float, ...] | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One attention to look at: its composed configuration, and which cell that would be."""

    cell: Cell
    config: configuration.Config
    starred: bool

    @property
    def label(self) -> str:
        """The attention and the options that differ from its defaults: `mra (blocks_per_row=4)`."""
        return f"{self.cell.attention} ({self.text})" if self.text else self.cell.attention

    @property
    def text(self) -> str:
        """The overrides alone, as they stand in the column `setting`."""
        pairs = (f"{key.removeprefix('attention.')}={value}" for key, value in self.cell.overrides.items())
        return " ".join(pairs)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 1 an attention failed, 2 a mistake in the command, which is one line."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        request = parse(arguments)
        from lra.lens.look import look

        return look(request, settings(_like_the_cell(request)))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(cli.explain(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str]) -> Request:
    """Split the keys of the lens from those of `run.py`; UserError for a value that is not possible."""
    own: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument} is not key=value; see --help")
        if key == "cell":
            own[key] = Path(value)
        elif key in ("length", "sequences"):
            own[key] = _positive(key, value)
        elif key == "scales":
            own[key] = _scales(value)
        else:
            overrides.append(argument)
    return Request(**own, overrides=tuple(overrides))


def _like_the_cell(request: Request) -> tuple[str, ...]:
    """The overrides, with the task and protocol of the trained cell: others are built as they would be there."""
    if request.cell is None:
        return request.overrides
    for key in ("task", "protocol"):
        if any(_key(override) == key for override in request.overrides):
            raise UserError(f"{key} is that of the trained cell; leave it out beside cell={request.cell}")
    identity = Cell.of(read_cell(request.cell))
    return (f"task={identity.task}", f"protocol={identity.protocol}", *request.overrides)


def _positive(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{key}={value} is not possible; it must be a positive integer")
    return int(value)


def _scales(value: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in value.strip("[]").split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise UserError(f"scales={value} is not possible; it must be positive numbers, as in scales=[0.5,1,2]")
    return scales


def settings(overrides: Sequence[str]) -> list[Setting]:
    """Every combination of the values between commas, composed and checked as `run.py` does it.

    An option of a method, `attention.blocks_per_row=4,8`, applies to the attentions that have it; UserError where
    none has.
    """
    keys = [_key(override) for override in overrides]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{twice[0]} is given twice; put a comma between values")
    choices = [list(_choices(override)) for override in overrides]
    names = [value.removeprefix("attention=") for values in choices for value in values if _key(value) == "attention"]
    for key in keys:
        if key.startswith("attention.") and names and not any(_has(name, key) for name in names):
            raise UserError(f"{key} is an option of none of {', '.join(names)}")
    found: dict[str, Setting] = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for combination in itertools.product(*choices):
            setting = _compose(combination)
            found.setdefault(setting.cell.label, setting)
    return list(found.values())


def _choices(override: str) -> Iterator[str]:
    [parsed] = OverridesParser.create().parse_overrides([override])
    if not parsed.is_sweep_override():
        yield override
        return
    for value in parsed.sweep_string_iterator():
        yield f"{parsed.get_key_element()}={value}"


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _has(name: str, key: str) -> bool:
    option = key.removeprefix("attention.")
    return name not in attention.names() or option in COMMON or option in attention.options(name)


def _compose(combination: Sequence[str]) -> Setting:
    name = next((o.removeprefix("attention=") for o in combination if _key(o) == "attention"), None)
    fitting = [o for o in combination if name is None or not _key(o).startswith("attention.") or _has(name, _key(o))]
    composed = compose("config", overrides=fitting, return_hydra_config=True)
    groups = composed.hydra.runtime.choices
    composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    config = configuration.load(composed)
    cell, starred = cli.identify(composed, groups)
    seen = {key: value for key, value in cell.overrides.items() if key.startswith(SEEN)}
    return Setting(replace(cell, overrides=seen), config, starred)
