"""From the command line to a cell: compose, check, run, report; every mistake one line, every outcome an exit code.

Exit codes: 0 finished, 1 the cell (or a cell of a multirun) failed, 2 a mistake in the command, 130 interrupted.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import attention
from lra import config as configuration
from lra import tasks
from lra.errors import UserError
from lra.record import Cell

IDENTITY = ("task", "attention", "protocol", "budget")
"""The config groups that name a cell."""

NOT_NUMBERS = (
    *("results_dir", "rerun", "seed", "data.root", "logger."),
    *("trainer.accelerator", "trainer.steps_per_call", "trainer.bare_steps"),
)
"""Keys that change no number of a cell: where things are written, how they are shown, what runs how fast."""

PROTOCOL_OWNS = ("model.", "training.", "protocol.", "task.")
"""Sections whose values a protocol fixes; a cell that overrides one is starred in the tables."""


UNKNOWN_CHOICE = re.compile(r"Could not find '([\w/]+)/([^/']+)'\s+Available options in '[\w/]+':\n((?:\t.*\n?)+)")
UNKNOWN_KEY = re.compile(r"Key '[^']+' is not in struct\s+full_key: (\S+)")
UNREADABLE = "override_grammar"
"""How Hydra and OmegaConf word the commonest mistakes, over several lines; the last points at a page of Hydra's."""


class CellFailedError(Exception):
    """A cell ended without a result; the message has been shown, `code` is the exit code."""

    def __init__(self, code: int = 1):
        super().__init__()
        self.code = code


DEFAULTS = {"task": "listops", "attention": "softmax"}
"""The choices of `conf/config.yaml`."""


def guard(main: Callable[[], Any]) -> int:
    """Run Hydra's main; turn mistakes into one line and everything into an exit code."""
    try:
        _refuse_two_cells(sys.argv[1:])
        main()
    except CellFailedError as failure:
        return failure.code
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(explain(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_one(composed: DictConfig) -> None:
    """Run the composed cell, refresh the tables, show the outcome; exits the process if that is not a finished cell."""
    if code := guard(lambda: _run_one(composed)):  # here, because Hydra comments on every exception that it sees
        sys.exit(code)


def _run_one(composed: DictConfig) -> None:
    config = configuration.load(composed)
    cell, starred = identify(composed, HydraConfig.get().runtime.choices)

    from lra import report  # imports pandas; `--cfg job` and mistakes need not wait for it
    from lra.staleness import stale
    from lra.train import help_cell, helps, run_cell

    if helps(config):
        return help_cell(config, cell)
    console = Console()
    record = run_cell(config, cell, starred=starred, console=console)
    tables = report.refresh(config.results_dir)
    report.print_cell(record, config.results_dir, console, report.row_of(tables.leaderboard, record))
    if reason := stale(record, config):
        console.print(f"stale: {reason}; rerun=true repeats it", soft_wrap=True)
    if record["status"] != "ok":
        raise CellFailedError(130 if record["status"] == "interrupted" else 1)


def _refuse_two_cells(arguments: Iterable[str]) -> None:
    """UserError for `attention=mra attention=lln`, of which Hydra takes the last, as of any key given twice."""
    named: dict[str, str] = {}
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key in (*IDENTITY, "seed") and (first := named.setdefault(key, value)) != value:
            both = f"run.py -m {key}={first},{value}"
            raise UserError(f"{key} is given twice, {first} and {value}; use one, or `{both}` for both")


def identify(composed: DictConfig, choices: Mapping[str, str]) -> tuple[Cell, bool]:
    """The cell of a composed configuration with these group choices, and whether it overrides what its protocol owns.

    Its overrides are found by composing the same groups without them: whatever differs and changes a number.
    """
    groups = {group: choices[group] for group in IDENTITY}
    for group in ("task", "attention"):
        if composed[group].name != groups[group]:
            raise UserError(f"{group}.name={composed[group].name} is not possible; choose with {group}=<name>")
    plain = compose("config", overrides=[f"{group}={choice}" for group, choice in groups.items()])
    mine, reference = (configuration.flatten(_resolve(c)) for c in (composed, plain))
    overrides = {
        key: mine.get(key)
        for key in sorted(mine.keys() | reference.keys())
        if mine.get(key) != reference.get(key) and not key.startswith(NOT_NUMBERS)
    }
    defaults = {f"attention.{key}": value for key, value in attention.options(choices["attention"]).items()}
    set_by_protocol = {key for key, value in defaults.items() if reference.get(key, value) != _plain(value)}
    starred = any(key.startswith(PROTOCOL_OWNS) or key in set_by_protocol for key in overrides)
    try:
        return Cell(**groups, seed=composed.seed, overrides=overrides), starred
    except ValueError as error:
        raise UserError(str(error)) from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resolve(composed: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def explain(error: Exception) -> str:
    """One line for a mistake that Hydra found: the key, the value, what is allowed."""
    text = f"{error}\n{error.__cause__ or ''}"
    if found := UNKNOWN_CHOICE.search(text):
        group, value, available = found.groups()
        return f"{group}={value} is unknown; known: {', '.join(available.split())}"
    if found := UNKNOWN_KEY.search(text):
        key = found[1]
        return f"{_as_typed(key)} is unknown: {_keys_beside(key)}"
    if UNREADABLE in text and (typed := _unreadable(sys.argv[1:])):
        return f"{typed} cannot be read; write key=value, a list as 'key=[1,2]', special characters as 'key=\"…\"'"
    return " ".join(str(error).split())


def _as_typed(key: str) -> str:
    """The argument that set `key`, as the user typed it."""
    return next((argument for argument in sys.argv[1:] if argument.partition("=")[0].lstrip("+~") == key), key)


def _unreadable(arguments: Iterable[str]) -> str | None:
    """The first argument that is no override."""
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            parser.parse_override(argument)
        except HydraException:
            if not argument.startswith("-"):
                return argument
    return None


def _keys_beside(key: str) -> str:
    section = key.rpartition(".")[0]
    if section in ("task", "attention"):
        options = {"task": tasks.options, "attention": attention.options}[section]
        name = _as_typed(section).partition("=")[2]
        if "," not in name:  # one choice, typed or the default
            known = list(options(name or DEFAULTS[section]))
            has = f"the options {', '.join(known)}" if known else "no options"
            return f"{section}={name or DEFAULTS[section]} has {has}"
    if section == "hydra.launcher":
        return "the files of conf/hydra/launcher hold its settings"
    known = configuration.section_keys(section)
    return f"there are {', '.join(known)}" if known else "`python run.py --cfg job` shows all keys"
