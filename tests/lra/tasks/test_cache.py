"""Prepared arrays are whole or absent, checked at every load, and made by one process at a time."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_recipe
from filelock import FileLock
from tiny_recipe import COUNTS, tiny

from lra.errors import UserError
from lra.tasks import cache

REPOSITORY = Path(__file__).parents[3]


def prepare(root, recipe):
    return cache.find_or_make(root, "tiny", recipe, progress=False)


def start(*arguments):
    command = [sys.executable, tiny_recipe.__file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digest_by_hand(splits):
    lines = []
    for name in ("train", "validation", "test"):
        for part in ("tokens", "labels"):
            array = getattr(splits[name], part)
            sha = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes()).hexdigest()
            lines.append(f"{name}_{part} {sha}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_what_was_made_is_what_is_loaded_mapped_and_described(tmp_path):
    made = prepare(tmp_path, tiny(3))
    loaded = prepare(tmp_path, tiny(3, log=tmp_path / "log"))
    assert not (tmp_path / "log").exists()
    assert made.counts == loaded.counts == COUNTS
    assert made.digest == loaded.digest == digest_by_hand(loaded.splits)
    train = loaded.splits["train"]
    assert isinstance(train.tokens, np.memmap)
    assert (train.tokens.shape, train.tokens.dtype, train.labels.dtype) == ((6, 2, 5), np.int16, np.uint8)
    assert (train.tokens[4] == 3004).all()
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    meta = json.loads((loaded.folder / "meta.json").read_text())
    assert (meta["counts"], meta["digest"], meta["source"]) == (COUNTS, made.digest, "tiny")
    assert (meta["parameters"], meta["vocabulary"]) == ({"parameter": 3}, ["a"])


def test_every_parameter_has_a_folder_of_its_own(tmp_path):
    assert prepare(tmp_path, tiny(1)).digest != prepare(tmp_path, tiny(2)).digest
    assert prepare(tmp_path, tiny(1)).folder != prepare(tmp_path, tiny(2)).folder


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_the_digest(path):
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0'))


DAMAGES = {
    "flipped": ("train_tokens.npy", flip_a_byte),
    "truncated": ("test_tokens.npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "emptied": ("test_labels.npy", lambda path: os.truncate(path, 0)),
    "missing": ("validation_labels.npy", Path.unlink),
    "other shape": ("train_tokens.npy", lambda path: np.save(path, np.load(path).reshape(12, 5))),
    "meta garbled": ("meta.json", lambda path: path.write_text("{")),
    "meta of another kind": ("meta.json", lambda path: path.write_text("[]")),
    "meta missing": ("meta.json", Path.unlink),
    "digest edited": (
        "meta.json",
        lambda path: path.write_text(path.read_text().replace('"digest": "', '"digest": "0')),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_generated_arrays_is_named_and_mended(tmp_path, caplog, damage):
    file, harm = DAMAGES[damage]
    made = prepare(tmp_path, tiny())
    harm(made.folder / file)
    mended = prepare(tmp_path, tiny())
    assert [str(made.folder / file) in record.message for record in caplog.records] == [True]
    assert "\n" not in caplog.text.strip()
    assert mended.digest == made.digest == digest_by_hand(mended.splits)
    assert {path.name for path in mended.folder.parent.iterdir()} == {made.folder.name, f"{made.folder.name}.lock"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_official_arrays_is_refused_with_the_path(tmp_path, damage):
    file, harm = DAMAGES[damage]
    made = prepare(tmp_path, tiny(remake=False))
    harm(made.folder / file)
    with pytest.raises(UserError, match=rf"^{made.folder / file} is damaged .*; delete {made.folder} to prepare it"):
        prepare(tmp_path, tiny(remake=False))


def test_arrays_follow_their_raw_files_but_outlive_them(tmp_path, caplog):
    raw, log = tmp_path / "raw.tsv", tmp_path / "log"
    raw.write_text("one")
    recipe = tiny(remake=False, inputs=(raw,), log=log)
    prepare(tmp_path, recipe)
    prepare(tmp_path, recipe)
    assert log.read_text() == "made\n"
    raw.write_text("other")
    prepare(tmp_path, recipe)
    assert log.read_text() == "made\nmade\n"
    assert "other versions of its raw files" in caplog.text
    raw.unlink()
    prepare(tmp_path, recipe)
    assert log.read_text() == "made\nmade\n"


def test_a_killed_writer_leaves_no_half_cache_and_no_lock(tmp_path):
    writer = start(tmp_path, tmp_path / "log", 60)
    folder = cache.location(tmp_path, "tiny", tiny())
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline
        assert writer.poll() is None, writer.communicate()
        time.sleep(0.02)
    writer.kill()
    writer.communicate()
    assert folder.with_name(f"{folder.name}.partial").exists()
    assert not folder.exists()
    data = prepare(tmp_path, tiny())
    assert data.digest == digest_by_hand(data.splits)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_writer_cleans_up_after_itself(tmp_path, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(cache, "_write_meta", interrupted)
    with pytest.raises(error):
        prepare(tmp_path, tiny())
    assert [path.suffix for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_of_eight_processes_one_makes_the_arrays_and_all_get_them(tmp_path):
    writers = [start(tmp_path, tmp_path / "log", 0.5) for _ in range(8)]
    results = [writer.communicate(timeout=60) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, results
    assert {out for out, _ in results} == {prepare(tmp_path, tiny()).digest + "\n"}
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_process_that_waits_says_so(tmp_path):
    folder = cache.location(tmp_path, "tiny", tiny())
    folder.parent.mkdir()
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        waiting = start(tmp_path, tmp_path / "log")
        assert waiting.stderr.readline() == f"waiting for another process that prepares {folder}\n"
        assert not (tmp_path / "log").exists()
    assert waiting.communicate(timeout=60)[1] == ""
    assert waiting.returncode == 0


def test_a_complete_cache_is_read_without_writing(tmp_path, monkeypatch):
    made = prepare(tmp_path, tiny())

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for module, function in [(cache, "FileLock"), (Path, "mkdir"), (Path, "rename"), (os, "open")]:
        monkeypatch.setattr(module, function, refuse)
    assert prepare(tmp_path, tiny()).digest == made.digest


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    recipe = tiny(log=tmp_path / "log")
    with pytest.raises(UserError, match=rf"data\.root={tmp_path}/file cannot be written \(.*\); choose another"):
        prepare(tmp_path / "file", recipe)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"data\.root=.* cannot be written \(Read-only file system\)"):
        prepare(tmp_path, recipe)
    assert not (tmp_path / "log").exists()


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    recipe = tiny(log=tmp_path / "log")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"has 0 MiB free, but tiny needs 1 MiB"):
        prepare(tmp_path, recipe)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"data\.root=.* is full \(No space left on device\)"):
        prepare(tmp_path, recipe)
    assert not (tmp_path / "log").exists()
    assert [path.suffix for path in (tmp_path / "tiny").iterdir()] == [".lock"]
