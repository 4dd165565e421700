"""The composed configuration as a checked, typed object: every mistake becomes one line before any data is touched."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import attention
from lra import tasks
from lra.errors import UserError
from lra.model import PAIR_HEADS, POOLINGS, POSITIONS, build_classifier, patch_order, sequence_length
from lra.schedules import SCHEDULES


def _require(section: str, condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"{section}{key}={value} is not possible; {allowed}")


def _positive(section: str, config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(section, value > 0, key, value, "it must be greater than zero")
        _require(section, math.isfinite(value), key, value, "it must be finite")


def _one_of(section: str, config: Any, **allowed: tuple) -> None:
    for key, values in allowed.items():
        _require(
            section,
            getattr(config, key) in values,
            key,
            getattr(config, key),
            f"use one of {', '.join(map(str, values))}",
        )


@dataclass
class ModelConfig:
    dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    dropout: float
    embedding_rows: int
    max_length: int
    pooling: str
    patch: list[int] | None = None
    positions: str = "learned"
    token_std: float = 0.02
    attention_bias: bool = True
    pair_head: str = "interaction"

    def __post_init__(self) -> None:
        sizes = ("dim", "num_layers", "num_heads", "head_dim", "ffn_dim", "embedding_rows", "max_length")
        _positive("model.", self, *sizes, "token_std")
        _require("model.", 0 <= self.dropout < 1, "dropout", self.dropout, "it must be in [0, 1)")
        _one_of("model.", self, pooling=POOLINGS, positions=POSITIONS, pair_head=PAIR_HEADS)
        even = self.positions == "learned" or self.dim % 2 == 0
        _require("model.", even, "dim", self.dim, "it must be even for model.positions=sinusoidal")
        pair = self.patch is None or (len(self.patch) == 2 and min(self.patch) > 0)
        _require("model.", pair, "patch", self.patch, "it must be [height, width] or null")


@dataclass
class TrainingConfig:
    batch_size: int
    steps: int
    warmup_steps: int
    validate_every: int
    learning_rate: float
    schedule: str
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _positive("training.", self, "batch_size", "steps", "validate_every", "learning_rate", "eps")
        allowed = f"it must be at least 2 and less than training.steps={self.steps}"
        ends = self.warmup_steps < self.steps or self.schedule != "onecycle_linear"
        _require("training.", self.warmup_steps >= 2 and ends, "warmup_steps", self.warmup_steps, allowed)
        if self.clip_norm is not None:
            _positive("training.", self, "clip_norm")
        decay = 0 <= self.weight_decay < math.inf
        _require("training.", decay, "weight_decay", self.weight_decay, "it must be finite and not negative")
        beta = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _require("training.", beta, "betas", self.betas, "it must be two numbers in [0, 1)")
        _one_of("training.", self, schedule=SCHEDULES)


@dataclass
class ProtocolConfig:
    name: str
    selection: str
    base_parameters: int | None = None
    parameter_margin: float = 0.1

    def __post_init__(self) -> None:
        _one_of("protocol.", self, selection=("validation", "test", "last"))
        _require("protocol.", self.parameter_margin >= 0, "parameter_margin", self.parameter_margin, "it must be >= 0")


@dataclass
class BudgetConfig:
    name: str


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    precision: str = "auto"
    compile: Any = "auto"
    steps_per_call: Any = "auto"
    accumulate: int = 1
    devices: int = 1
    deterministic: bool = False
    bare_steps: int = 0

    def __post_init__(self) -> None:
        _positive("trainer.", self, "accumulate", "devices")
        _require("trainer.", self.bare_steps >= 0, "bare_steps", self.bare_steps, "it must not be negative")
        _one_of("trainer.", self, compile=("auto", True, False))
        _one_of("trainer.", self, accelerator=("auto", "cpu", "cuda"), precision=("auto", "32", "bf16"))
        calls = self.steps_per_call
        valid = calls == "auto" or (isinstance(calls, int) and calls > 0)
        _require("trainer.", valid, "steps_per_call", calls, "use auto or a positive integer")


@dataclass
class LoggerConfig:
    name: str
    project: str | None = None
    entity: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _one_of("logger.", self, name=("csv", "wandb", "none"))


@dataclass
class DataConfig:
    root: str


@dataclass
class Config:
    """One cell, as `conf/` composes it. `task` and `attention` hold a name and the options of that name."""

    task: dict[str, Any]
    attention: dict[str, Any]
    model: ModelConfig
    training: TrainingConfig
    protocol: ProtocolConfig
    budget: BudgetConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    data: DataConfig
    results_dir: str
    seed: int = 0
    rerun: Any = False
    resolved: dict[str, Any] = field(default_factory=dict)  # the whole configuration as plain containers

    def __post_init__(self) -> None:
        _require("", 0 <= self.seed < 2**31, "seed", self.seed, "it must be in [0, 2^31)")
        known = isinstance(self.rerun, bool) or self.rerun == "failed"  # 0 == False, yet would repeat every cell
        _require("", known, "rerun", self.rerun, "it must be false, true or failed")
        for key, folder in (("results_dir", self.results_dir), ("data.root", self.data.root)):
            _require("", bool(folder), key, folder, "it must name a folder")
        parts, devices, batch = self.trainer.accumulate, self.trainer.devices, self.training.batch_size
        allowed = f"it must divide training.batch_size={batch}"
        _require("trainer.", batch % parts == 0, "accumulate", parts, allowed)
        _require("trainer.", batch % (parts * devices) == 0, "devices", devices, f"{allowed}, times accumulate={parts}")

    @property
    def afresh(self) -> bool:
        """Whether the cell starts again though it has finished; `rerun=failed` only repeats one that failed."""
        return self.rerun is True

    @property
    def task_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.task.items() if key != "name"}

    @property
    def attention_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.attention.items() if key != "name"}


def load(composed: DictConfig) -> Config:
    """Check a composed configuration: types, ranges, names, and the options of its task and attention.

    Raises UserError, one line with the key, the value and what is allowed.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        schema = OmegaConf.structured(Config)
        config = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; set it, or use a protocol that does") from error
    except OmegaConfBaseException as error:
        raise UserError(explain(error, composed)) from error
    assert isinstance(config, Config)
    config.resolved = {str(key): value for key, value in plain.items()}
    _check_options(config)
    return config


TYPES = {"Integer": "an integer", "Float": "a number", "bool": "true or false", "String": "a text"}
"""OmegaConf's names of types, in words."""


def explain(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """One line for a key that a section does not have, or a value of the wrong type."""
    key = str(error.full_key)
    value = OmegaConf.select(composed, key, default=None)
    if re.search(r"Key '[^']+' not in '\w+'", str(error)):
        return f"{key}={value} is unknown: there are {', '.join(section_keys(key.rpartition('.')[0]))}"
    wanted = re.search(r"(could not be converted to|is not a valid) (\w+)", str(error))
    if wanted is None:
        return f"{key}={value} is not possible: {str(error).splitlines()[0]}"
    return f"{key}={value} is not possible; it must be {TYPES.get(wanted[2], wanted[2])}"


def _check_options(config: Config) -> None:
    task = _build("task", tasks.build, config.task, config.task_options)
    if config.model.embedding_rows < task.vocab_size:
        allowed = f"task {task.name} needs at least {task.vocab_size}"
        _require("model.", False, "embedding_rows", config.model.embedding_rows, allowed)
    if config.model.max_length < task.max_length:
        allowed = f"task.max_length is {task.max_length}"
        _require("model.", False, "max_length", config.model.max_length, f"it must be at least that long: {allowed}")
    if config.model.patch is not None:
        _checked(patch_order, config.model.max_length, *config.model.patch)
    for key in ("num_heads", "head_dim", "max_length", "causal"):
        if key in config.attention_options:
            _require("attention.", False, key, config.attention[key], "the model and the task set it")
    sizes = {key: getattr(config.model, key) for key in ("num_heads", "head_dim")}
    sizes["max_length"] = sequence_length(config.model.max_length, config.model.pooling)
    _build("attention", attention.build, config.attention, {**sizes, **config.attention_options})
    if config.protocol.base_parameters is not None:
        _check_parameters(config, task, config.protocol.base_parameters)


def _check_parameters(config: Config, task: tasks.Task, base: int) -> None:
    """The benchmark's rule: an entry has at most a tenth more parameters than the base Transformer."""
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(
            asdict(config.model),
            config.attention["name"],
            config.attention_options,
            num_classes=task.num_classes,
            two_towers=task.two_towers,
        )
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    margin, more = config.protocol.parameter_margin, count / base - 1
    if more > margin:
        raise UserError(
            f"attention={config.attention['name']} has {count:,} parameters on {task.name}, {100 * more:.1f} % more "
            f"than the base Transformer ({base:,}); protocol={config.protocol.name} allows {100 * margin:g} %, "
            f"protocol.parameter_margin={math.ceil(100 * more) / 100:g} admits it and stars the row"
        )


def _build(section: str, build: Callable[..., Any], chosen: dict[str, Any], arguments: dict[str, Any]) -> Any:
    if not isinstance(chosen.get("name"), str):
        raise UserError(f"{section}.name is missing in conf/{section}/; every file there starts with its name")
    return _checked(build, chosen["name"], **arguments)


def _checked(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call something that refuses impossible values in one line, and pass the line on as the user's mistake."""
    try:
        return function(*arguments, **options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def section_keys(section: str) -> list[str]:
    """The keys that a section of the configuration has, for messages about an unknown one."""
    kinds = {
        "model": ModelConfig,
        "training": TrainingConfig,
        "protocol": ProtocolConfig,
        "budget": BudgetConfig,
        "trainer": TrainerConfig,
        "logger": LoggerConfig,
        "data": DataConfig,
        "": Config,
    }
    return [f.name for f in fields(kinds[section]) if f.name != "resolved"] if section in kinds else []
