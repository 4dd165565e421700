"""From the command line of `scripts/efficiency.py` to records, `efficiency.csv` and the curves."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pandas as pd
import torch

import attention
from lra.efficiency import picture, table, timing
from lra.efficiency.cases import BASELINE, LENGTHS, TOKENS, cases
from lra.efficiency.compilation import compile_ahead
from lra.efficiency.measure import Run
from lra.record import Record

T = TypeVar("T")

DESCRIPTION = """\
Measure every registered attention beside PyTorch's exact attention: forward, forward + backward, peak memory.

Each attention is first checked against float64, then timed in turn with the fastest exact attention of the device. On a
GPU times are those of CUDA graph replays; on a CPU, of a clock, for a look at tiny sizes. Rows are recorded one by one
below RESULTS_DIR/efficiency; efficiency.csv and the curves are rebuilt from all records at the end."""

MASKS = {"none": False, "padding": True}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 done, 1 where a row failed its check or broke, 2 a mistake in the command, 130 interrupted.

    Every row is on disk before the next one begins; table and curves are made of what there is, also after an end
    before time.
    """
    request = parse(arguments)
    device = torch.device(request.device)
    groups = list(cases(request.only, request.lengths, request.shapes, request.masks, request.tokens))
    run, code, started = Run(device), 0, time.monotonic()
    if workers := compile_ahead(groups, device):
        print(f"compiled with {workers} processes in {time.monotonic() - started:.0f} s", flush=True)
    run.start()
    left = sum(map(len, groups))
    print(f"{run.device_name}, a copy moves {run.bandwidth:,.0f} GB/s; {left} rows", flush=True)
    try:
        for record in (record for group in groups for record in run.group(group)):
            table.store(request.results_dir, record)
            left -= 1
            print(f"{line(record)}   {time.monotonic() - started:.0f} s, {left} left", flush=True)
            if record["status"] in ("wrong", "error"):
                code = 1
                if not timing.alive(device):
                    print(f"{run.device_name} is lost to this process; the {left} rows left are not measured")
                    break
    except KeyboardInterrupt:
        code = 130
    finish(request.results_dir, run.device_name)
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The request; a mistake ends the process with exit code 2."""
    known = attention.names()
    parser = argparse.ArgumentParser(
        "scripts/efficiency.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--protocol lra, mra or skyformer measures as a paper did; --protocol lra --help shows its options.",
    )
    add = parser.add_argument
    add("--only", type=_list(_one_of(known)), default=known, metavar="NAME,…", help="attentions; default: all")
    add("--lengths", type=_list(_positive), default=LENGTHS, metavar="N,…", help=f"default: {_joined(LENGTHS)}")
    shapes = {f"{heads}x{dim}": (heads, dim) for heads, dim in TOKENS}
    add("--shapes", type=_list(_one_of(shapes)), default=list(shapes), metavar="HxD,…",
        help=f"heads x head dimension, of {_joined(shapes)}; default: all")  # fmt: skip
    add("--masks", type=_list(_one_of(MASKS)), default=list(MASKS), metavar="MASK,…",
        help=f"of {_joined(MASKS)}; default: both")  # fmt: skip
    tokens = ", ".join(f"{count} for {heads}x{dim}" for (heads, dim), count in TOKENS.items())
    add("--tokens", type=_positive, help=f"tokens of a call; default: {tokens}")
    add("--device", default="cuda", help="default: cuda; cpu for a look at small sizes")
    add("--results-dir", type=Path, default=Path("results"), help="default: results")
    request = parser.parse_args(arguments)
    if BASELINE not in request.only:
        request.only = [BASELINE, *request.only]  # it is measured anyway
    request.shapes = [shapes[name] for name in request.shapes]
    request.masks = [MASKS[name] for name in request.masks]
    if request.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {request.device} is not here; --device cpu --tokens 2048 --lengths 256,512 has a look")
    return request


def finish(results_dir: Path, device: str) -> None:
    """Tables and pictures from all records, and a summary of the ratios on the screen."""
    frame, problems = table.refresh(results_dir)
    paths = [made.path for made in picture.draw(results_dir, frame)]
    print(summary(cast(pd.DataFrame, frame[frame["device"] == device])))
    for path in (results_dir / table.FILE, *(f"{path}.svg, .png" for path in paths)):
        print(path)
    for problem in problems:
        print(f"problem: {problem}")


def summary(frame: pd.DataFrame) -> str:
    """For each shape and mask: time ratio by length, and the slopes, a line an attention."""
    parts = []
    scope = ["heads", "head_dim", "tokens", "masked"]
    slopes = table.slopes(frame).set_index(["attention", *scope])
    shapes: Any = frame.groupby(scope)
    for (heads, dim, tokens, masked), rows in shapes:
        shown = rows.pivot_table("time_ratio", "attention", "length", dropna=False)
        for slope in table.SLOPES:
            shown[slope] = [slopes.loc[(name, heads, dim, tokens, masked), slope] for name in shown.index]
        about = f"H={heads} D={dim}, {tokens:,} tokens{', padding mask' if masked else ''}"
        parts.append(f"forward + backward over softmax's, {about}")
        parts.append(shown.to_string(float_format="%.3f", na_rep=""))
    return "\n".join(parts)


def line(record: Record) -> str:
    """One row on the screen."""
    row = table.row_of(record)
    mask = " masked" if row["masked"] else ""
    name = f"{row['attention']} ({row['impl']})" if row["impl"] else row["attention"]
    head = f"{name:<26} N={row['length']:<5} H={row['heads']} D={row['head_dim']}{mask:<7}"
    if record["status"] not in ("ok", "oom"):
        return f"{head} {record['status']}: {row['message']}"
    numbers = (
        ("fwd", row["fwd_ms"], " ms", row["fwd_ratio"]),
        ("fwd+bwd", row["fwd_bwd_ms"], " ms", row["time_ratio"]),
        ("peak", row["peak_mem_mib"], " MiB", row["memory_ratio"]),
    )
    parts = [f"{what} {value:.4g}{unit}{_times(ratio)}" for what, value, unit, ratio in numbers if value is not None]
    how = "" if row["timing"] in ("graph", None) else f"[{row['timing']}]"
    status = "" if record["status"] == "ok" else f"{record['status']}: {record['message']}"
    return "  ".join(part for part in (head, *parts, how, status) if part)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.3f})"


def _list(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A parser of values between commas, each once."""

    def parse_list(text: str) -> list[T]:
        return list(dict.fromkeys(item(part) for part in text.split(",")))

    return parse_list


def named_attentions(text: str) -> list[str]:
    """Parser of registered names between commas."""
    return _list(_one_of(attention.names()))(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; it must be a positive integer")
    return int(text)


def _one_of(known: Any) -> Callable[[str], str]:
    def parse_name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text} is unknown; known: {_joined(known)}")
        return text

    return parse_name


def _joined(values: Any) -> str:
    return ", ".join(map(str, values))
