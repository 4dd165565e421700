"""Fashion-MNIST from its own files, a Debian package or the hub: the same arrays, or one clear line."""

import gzip
import hashlib
import io
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from lra import tasks
from lra.errors import UserError
from lra.tasks import debian, image_fashion

DIGEST = "749864dae24edde41c42ce1c65b7228081c1a8493d95347af11185293bbdbfab"
"""Of `task=image_fashion` with its defaults. The README prints it."""

COUNTS = {"train": 4, "validation": 2, "test": 3}
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8)
LABELS = np.arange(9, dtype=np.uint8)


@pytest.fixture(autouse=True)
def nine_images(monkeypatch, tmp_path):
    """The data set has six images for training and three for testing, and no package of it is installed."""
    monkeypatch.setattr(image_fashion, "COUNTS", COUNTS)
    monkeypatch.setattr(debian, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(debian, "available", lambda: False)


def parts():
    return {"train": slice(0, 6), "test": slice(6, 9)}


def idx(folder, monkeypatch):
    """The four files in their official format."""
    folder.mkdir(parents=True)
    known = {}
    for part, rows in parts().items():
        count = len(LABELS[rows])
        header = np.array([0x803, count, 28, 28], ">u4").tobytes(), np.array([0x801, count], ">u4").tobytes()
        for name, content in zip(
            image_fashion.FILES[part],
            (header[0] + IMAGES[rows].tobytes(), header[1] + LABELS[rows].tobytes()),
            strict=True,
        ):
            (folder / name).write_bytes(gzip.compress(content))
            known[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(image_fashion, "SHA256", known)
    return folder


def parquet(folder):
    """The files of the hub's repository."""
    folder.mkdir(parents=True)
    for part, rows in parts().items():
        encoded = []
        for image in IMAGES[rows]:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": encoded, "label": LABELS[rows].astype(np.int64)})
        pyarrow.parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def prepare(root, **options):
    return tasks.build("image_fashion", **options).prepare(root, progress=False)


def test_images_get_a_black_border_and_the_last_of_train_validate(tmp_path, monkeypatch):
    idx(tmp_path / "fashion-mnist", monkeypatch)
    data = prepare(tmp_path)
    assert data.source == "local"
    assert data.counts == COUNTS
    tokens = np.concatenate([split.tokens for split in data.splits.values()]).reshape(9, 32, 32)
    assert np.array_equal(tokens[:, 2:30, 2:30], IMAGES)
    assert tokens.sum() == IMAGES.sum(dtype=int)
    assert np.concatenate([split.labels for split in data.splits.values()]).tolist() == LABELS.tolist()


def test_black_can_be_a_pixel(tmp_path, monkeypatch):
    idx(tmp_path / "fashion-mnist", monkeypatch)
    data = prepare(tmp_path, black="pixel", train_size=1)
    assert data.counts == {"train": 1, "validation": 2, "test": 3}
    tokens = data.splits["train"].tokens.reshape(32, 32)
    assert tokens.dtype == np.int16
    assert tokens[0, 0] == 1
    assert np.array_equal(tokens[2:30, 2:30], IMAGES[0].astype(int) + 1)


def test_all_sources_give_the_same_arrays(tmp_path, monkeypatch):
    idx(tmp_path / "a" / "fashion-mnist", monkeypatch)
    parquet(tmp_path / "b" / "hub" / "zalando-datasets" / "fashion_mnist")
    first, second = prepare(tmp_path / "a"), prepare(tmp_path / "b")
    assert (first.source, second.source) == ("local", "hub")
    assert first.digest == second.digest


@pytest.mark.parametrize("absolute", [True, False])
def test_a_debian_package_is_fetched_where_there_is_apt(tmp_path, monkeypatch, absolute):
    files = idx(tmp_path / "made", monkeypatch)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root" if absolute else Path("root")

    def run(command, cwd, **_):
        if command[0] == "apt-get":
            assert command == ["apt-get", "download", "dataset-fashion-mnist"]
            Path(cwd, "dataset-fashion-mnist_0_all.deb").touch()
        else:
            assert Path(cwd, command[2]).is_file()
            place = Path(cwd, command[3], image_fashion.FOLDER)
            place.parent.mkdir(parents=True)
            place.symlink_to(files)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian, "available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    data = prepare(root)
    assert data.source == "debian"
    assert (root / "debian" / "dataset-fashion-mnist" / image_fashion.FOLDER).is_dir()


def test_a_failed_fetch_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "noise\nE: Unable to locate package dataset-fashion-mnist\n")
    monkeypatch.setattr(debian, "available", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        UserError, match=r"could not be fetched .*E: Unable to locate package .*apt-get install"
    ) as caught:
        prepare(tmp_path, source="debian")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "debian").iterdir() if path.suffix != ".lock"]


def test_a_missing_folder_is_refused_with_its_place(tmp_path):
    with pytest.raises(UserError, match=rf"task\.source=local: {tmp_path}/fashion-mnist is missing: put train-images"):
        prepare(tmp_path, source="local")


@pytest.mark.parametrize("damage", [b"", b"no gzip", "half"])
def test_a_damaged_file_is_refused(tmp_path, monkeypatch, damage):
    file = idx(tmp_path / "fashion-mnist", monkeypatch) / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9] if damage == "half" else damage)
    with pytest.raises(UserError, match=rf"{file} (cannot be read|is not the file)"):
        prepare(tmp_path)


def test_another_file_under_the_same_name_is_refused(tmp_path, monkeypatch):
    file = idx(tmp_path / "fashion-mnist", monkeypatch) / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0" * 11))
    with pytest.raises(UserError, match=f"{file} is not the file of Fashion-MNIST"):
        prepare(tmp_path)


def test_too_few_images_on_the_hub_are_refused(tmp_path, monkeypatch):
    parquet(tmp_path / "hub" / "zalando-datasets" / "fashion_mnist")
    monkeypatch.setattr(image_fashion, "COUNTS", COUNTS | {"train": 5})
    with pytest.raises(UserError, match="has 6 images in train, expected 7"):
        prepare(tmp_path)
