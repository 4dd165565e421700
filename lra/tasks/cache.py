"""Prepared arrays on disk: made once, checked at every load, shared by all processes.

<root>/<task>/<key>/            key = hash of everything that changes the data
    train_tokens.npy  train_labels.npy  validation_…  test_…
    meta.json                   counts, parameters, digests, how made
<root>/<task>/<key>.partial/    being written; the folder appears under its own name only when complete
<root>/<task>/<key>.lock        locked by the process that writes (the kernel unlocks it when that one dies)
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lra.errors import UserError
from lra.tasks.arrays import SPLITS, Recipe, Shapes, Split, TaskData

FORMAT = 1
"""Of the files described above; another format is another key."""

LABEL_DTYPE = np.uint8

log = logging.getLogger(__name__)


class _Damaged(Exception):
    """A cache that is there but is not what was written; one line that names the file."""


def find_or_make(root: Path, task: str, recipe: Recipe, progress: bool = True) -> TaskData:
    """The arrays of `recipe` under `root`, made first where they are missing; see `lra.tasks.base.Task.prepare`."""
    folder = location(root, task, recipe)
    try:
        found = _load(folder, recipe)
    except _Damaged as damage:
        if not recipe.remake:
            raise UserError(f"{damage}; delete {folder} to prepare it again") from None
        found = None
    if found is not None:
        return found
    with _only_writer(root, folder):
        try:
            found = _load(folder, recipe)  # another process may have made it while this one waited
        except _Damaged as damage:
            log.warning("%s; making it again", damage)
        return found or _make(folder, task, recipe, progress)


def location(root: Path, task: str, recipe: Recipe) -> Path:
    """The folder of a recipe's arrays, whether or not it exists: a function of task, source and parameters."""
    identity = {"format": FORMAT, "source": recipe.source, **recipe.parameters}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(root) / task / key


# Loading


def _load(folder: Path, recipe: Recipe) -> TaskData | None:
    """The arrays in `folder`; None where there are none, or where they are not of the raw files at hand."""
    try:
        if not folder.exists():
            return None
        meta = json.loads((folder / "meta.json").read_text())
        recorded, inputs, digest = dict(meta["sha256"]), meta["inputs"], meta["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{folder / 'meta.json'} is damaged ({_brief(error)})") from None
    at_hand = recipe.inputs and all(path.exists() for path in recipe.inputs)
    if at_hand and inputs != _fingerprint(recipe.inputs):
        log.warning("%s was made from other versions of its raw files; making it again", folder)
        return None
    splits = {name: Split(*(_map(folder / f"{name}_{part}.npy") for part in Split._fields)) for name in SPLITS}
    actual = _digests(splits)
    for array, sha in actual.items():
        if recorded.get(array) != sha:
            raise _Damaged(f"{folder / array}.npy is damaged (its digest is not the one recorded)")
    if _combine(actual) != digest:
        raise _Damaged(f"{folder / 'meta.json'} is damaged (its digests disagree)")
    return TaskData(splits, digest, recipe.source, folder)


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _Damaged(f"{path} is damaged ({_brief(error)})") from None


def _digests(splits: dict[str, Split]) -> dict[str, str]:
    """sha256 of each array: a line `dtype shape`, then its bytes in C order."""

    def digest(array: np.ndarray) -> str:
        sha = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
        return sha.hexdigest()

    arrays = {f"{name}_{part}": getattr(splits[name], part) for name in SPLITS for part in Split._fields}
    with ThreadPoolExecutor(max_workers=min(len(arrays), os.cpu_count() or 1)) as pool:  # hashlib drops the GIL
        return dict(zip(arrays, pool.map(digest, arrays.values()), strict=True))


def _combine(digests: dict[str, str]) -> str:
    """The digest of the data: sha256 over lines `array sha256`, splits in their order, tokens before labels."""
    return hashlib.sha256("".join(f"{array} {sha}\n" for array, sha in digests.items()).encode()).hexdigest()


def _fingerprint(inputs: tuple[Path, ...]) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in inputs}


# Making


@contextmanager
def _only_writer(root: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, and turn what a file system can refuse into one line."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.warning("waiting for another process that prepares %s", folder)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"data.root={root} cannot be written ({_brief(error)}); choose another data.root") from None
    try:
        yield
    except OSError as error:
        what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written"
        raise UserError(f"data.root={root} {what} ({_brief(error)}); choose another data.root") from None
    finally:
        lock.release()


def _make(folder: Path, task: str, recipe: Recipe, progress: bool) -> TaskData:
    partial, old = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):  # of a writer that was killed; the lock says it is gone
        shutil.rmtree(leftover, ignore_errors=True)
    shapes = recipe.shapes()
    _check_space(folder.parent, task, shapes, recipe.dtype)
    partial.mkdir()
    try:
        splits = {name: _create(partial, name, shapes[name], recipe.dtype) for name in SPLITS}
        _fill(task, recipe, splits, shapes, progress)
        for array in (array for split in splits.values() for array in split):
            array.flush()  # type: ignore[attr-defined]  # a memmap
        _write_meta(partial / "meta.json", task, recipe, shapes, splits)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    data = _load(folder, recipe)
    assert data is not None
    return data


def _check_space(parent: Path, task: str, shapes: Shapes, dtype: type) -> None:
    tokens = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize
    needed = tokens + sum(shape[0] for shape in shapes.values()) + (1 << 20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{parent} has {free >> 20} MiB free, but {task} needs {needed >> 20} MiB; choose another data.root"
        )


def _create(folder: Path, name: str, shape: tuple[int, ...], dtype: type) -> Split:
    def create(part: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path = folder / f"{name}_{part}.npy"
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, but a SIGBUS in a write to mapped memory
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    return Split(create("tokens", dtype, shape), create("labels", LABEL_DTYPE, shape[:1]))


def _fill(task: str, recipe: Recipe, splits: dict[str, Split], shapes: Shapes, progress: bool) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        total = sum(shape[0] for shape in shapes.values())
        job = bar.add_task(f"Preparing {task} ({recipe.source})", total=total)
        recipe.fill(splits, lambda examples: bar.advance(job, examples))


def _write_meta(path: Path, task: str, recipe: Recipe, shapes: Shapes, splits: dict[str, Split]) -> None:
    digests = _digests(splits)
    meta: dict[str, Any] = {
        "task": task,
        "source": recipe.source,
        "parameters": dict(recipe.parameters),
        "counts": {name: shape[0] for name, shape in shapes.items()},
        **recipe.notes,
        "inputs": _fingerprint(recipe.inputs),
        "sha256": digests,
        "digest": _combine(digests),
    }
    with path.open("w") as file:
        json.dump(meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _brief(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0]
