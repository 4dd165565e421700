"""One look through the lens: build the inputs, measure every attention on them, record, derive, draw."""

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import attention
from attention import Attention
from lra import provenance, tasks
from lra.errors import UserError
from lra.lens import table
from lra.lens.command import Request, Setting
from lra.lens.measurement import measure
from lra.lens.picture import Panel, draw
from lra.lens.sweep import SCALES, gaussian_qkv, sweep
from lra.lens.trained import Layer, layers, load_model, read_cell, validation_tokens
from lra.record import FILENAME, SCHEMA, Cell, write_json
from lra.seeding import seed_all

LONGEST = 2048
"""Default limit of a Gaussian input: beyond, a matrix takes gigabytes and minutes; `length` overrides it."""

SWEEP_LENGTH = 512
"""Tokens of the curves: more than MRA's 8 blocks of 32 a row, short enough for eigenvalues at every scale."""

CLOSE_UP = 128
"""Tokens of a Gaussian input that the picture shows."""


@dataclass(frozen=True)
class Source:
    """What is looked at: a name for the column `source`, a folder for the records, and each layer's inputs."""

    name: str
    folder: Path
    layers: list[Layer]
    numbered: bool  # layers of a model, not one Gaussian input
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """An attention to look at: one module a layer of the source."""

    label: str
    text: str
    cell: Cell
    starred: bool
    modules: list[Attention]


def look(request: Request, chosen: Sequence[Setting]) -> int:
    """Measure, record, refresh `lens.csv`, draw; 1 where an attention could not be measured, else 0."""
    results_dir = Path(chosen[0].config.results_dir)
    device = _device(chosen[0].config.trainer.accelerator)
    if request.cell is None:
        source = _gaussian_source(request, chosen[0])
        subjects = [_untrained(setting, source) for setting in chosen]
    else:
        source, own = _trained_source(request, chosen[0])
        asked = [s for s in chosen if any(o.startswith("attention=") for o in request.overrides)]
        others = [s for s in asked if s.cell.attention != own.cell.attention]
        subjects = [own, *(_untrained(setting, source) for setting in others)]

    panels, curves, failed = [], {}, 0
    for subject in subjects:
        print(f"{subject.label}: {source.name} …", flush=True)
        try:
            rows, matrices = _measure_layers(subject, source, device)
            points = _sweep(subject, source, request.scales or SCALES, device)
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"{subject.label}: {str(error).splitlines()[0]}", file=sys.stderr)
            failed = 1
            continue
        curves[subject.label] = points
        panels += [_panel(subject, row, matrix) for row, matrix in zip(rows, matrices, strict=True)]
        record = _record(subject, source, [*rows, *points], device)
        write_json(results_dir / table.FOLDER / source.folder / subject.cell.name / FILENAME, record)
    print(table.refresh(results_dir))
    if panels:
        picture = results_dir / table.FOLDER / source.folder / "lens"
        draw(picture, source.name, panels, curves)
        print(f"{picture}.png\n{picture}.svg")
    return failed


# Sources and subjects


def _gaussian_source(request: Request, setting: Setting) -> Source:
    config = setting.config
    task = tasks.build(**config.task)
    length = request.length or min(task.max_length, LONGEST)
    sizes = (request.sequences, config.model.num_heads, length, config.model.head_dim)
    if length > config.model.max_length:
        raise UserError(f"length={length} is not possible; model.max_length is {config.model.max_length}")
    q, k, v = gaussian_qkv(*sizes, seed=config.seed)
    name = f"Gaussian q, k, v (N = {length}, seed {config.seed})"
    folder = Path(setting.cell.protocol, setting.cell.task, f"gaussian-{length}-seed{config.seed}")
    layer = Layer(_build(setting), q, k, v, None)
    return Source(name, folder, [layer], numbered=False, info={"kind": "gaussian", "length": length})


def _trained_source(request: Request, setting: Setting) -> tuple[Source, Subject]:
    assert request.cell is not None
    record = read_cell(request.cell)
    model, task = load_model(request.cell, record)
    cell = Cell.of(record)
    elsewhere = any(override.startswith("data.root=") for override in request.overrides)
    data_root = Path(setting.config.data.root if elsewhere else record["config"]["data"]["root"])
    tokens = validation_tokens(task, data_root, request.sequences)
    seen = layers(model, tokens)
    folder = Path(cell.protocol, cell.task, f"trained-{cell.name}-{cell.budget}-seed{cell.seed}")
    info = {"kind": "trained", "cell": cell.to_dict(), "code": record.get("code")}
    source = Source(f"trained {cell.label}, validation", folder, seen, numbered=True, info=info)
    text = " ".join(f"{key.removeprefix('attention.')}={value}" for key, value in cell.overrides.items())
    return source, Subject(cell.attention, text, cell, False, [layer.module for layer in seen])


def _untrained(setting: Setting, source: Source) -> Subject:
    modules = [_build(setting, like=layer.module) for layer in source.layers]
    return Subject(setting.label, setting.text, setting.cell, setting.starred, modules)


def _build(setting: Setting, like: Attention | None = None) -> Attention:
    """The attention of a setting as a model would build it; of the sizes of `like` where that is given."""
    model = setting.config.model
    sizes = like or model
    seed_all(setting.config.seed, "init")
    options = setting.config.attention_options
    shape = dict(num_heads=sizes.num_heads, head_dim=sizes.head_dim, max_length=sizes.max_length)
    return attention.build(setting.config.attention["name"], **shape, **options).eval()


# Measurements


def _measure_layers(
    subject: Subject, source: Source, device: torch.device
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    rows, matrices = [], []
    for at, (module, layer) in enumerate(zip(subject.modules, source.layers, strict=True)):
        module = module.to(device)
        q, k, v, key_mask = _on(layer, device)
        values, matrix = measure(module, q, k, v, key_mask)
        layer_number = {"layer": at} if source.numbered else {}
        rows.append(
            {**layer_number, "scale": 1.0, "length": q.shape[2], "ms": _forward_ms(module, q, k, v, key_mask), **values}
        )
        matrices.append(_shown(matrix, key_mask))
    return rows, matrices


def _sweep(subject: Subject, source: Source, scales: Sequence[float], device: torch.device) -> list[dict[str, Any]]:
    """The curves, on the first layer's first tokens."""
    q, k, v, key_mask = _on(source.layers[0], device)
    q, k, v = (x[:, :, :SWEEP_LENGTH] for x in (q, k, v))
    key_mask = None if key_mask is None else key_mask[:, :SWEEP_LENGTH]
    points = sweep(subject.modules[0].to(device), q, k, v, key_mask, scales=scales)
    layer = {"layer": 0} if source.numbered else {}
    return [{**layer, "length": q.shape[2], **point} for point in points]


def _forward_ms(module: Attention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> float:
    """Median time of one forward call on these inputs, in the dtype that training uses on the device."""
    q, k, v = (x.to(_dtype(q.device)) for x in (q, k, v))
    names = {"module": module, "q": q, "k": k, "v": v, "key_mask": key_mask}
    with torch.no_grad():
        return Timer("module(q, k, v, key_mask)", globals=names).blocked_autorange(min_run_time=0.1).median * 1e3


def _on(layer: Layer, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mask = layer.key_mask
    return layer.q.to(device), layer.k.to(device), layer.v.to(device), None if mask is None else mask.to(device)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _device(accelerator: str) -> torch.device:
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


# Records and the picture


def _record(subject: Subject, source: Source, rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    module = subject.modules[0]
    return {
        "schema": SCHEMA,
        "kind": table.KIND,
        "status": "ok",
        "cell": subject.cell.to_dict(starred=subject.starred),
        "source": source.info,
        "common": {
            "attention": subject.cell.attention,
            "setting": subject.text,
            "task": subject.cell.task,
            "protocol": subject.cell.protocol,
            "source": source.name,
            "heads": module.num_heads,
            "head_dim": module.head_dim,
            "sequences": source.layers[0].q.shape[0],
            "seed": subject.cell.seed,
            "device": provenance.device_description(device)["name"],
            "dtype": str(_dtype(device)).removeprefix("torch."),
            "impl": module.implementation(device),
        },
        "rows": rows,
        "code": provenance.code_revision(),
        "versions": provenance.versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _panel(subject: Subject, row: dict[str, Any], matrix: Tensor) -> Panel:
    title = f"{subject.label}, layer {row['layer'] + 1}" if "layer" in row else subject.label
    if row["negative_share"] > 0:
        note = f"{row['negative_share']:.1%} negative weight"
    else:
        note = f"H = {row['entropy']:.2f} bits, γ = {max(0.0, row['spectral_gap']):.2f}"
    whole = "layer" in row  # a Gaussian input has no structure that a part of it does not show
    return Panel(title, note, matrix if whole else matrix[:CLOSE_UP, :CLOSE_UP], uniform=1 / len(matrix))


def _shown(matrix: Tensor, key_mask: Tensor | None) -> Tensor:
    """The first head's matrix of the first sequence that has real tokens, those alone."""
    if key_mask is None:
        return matrix[0, 0]
    first = int(key_mask.any(-1).to(torch.uint8).argmax())
    place = key_mask[first].nonzero().squeeze(1)
    return matrix[first, 0][place[:, None], place]
