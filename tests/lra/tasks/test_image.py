"""CIFAR-10 from parquet files of the hub's schema: exact grey pixels of real images, one clear line without them."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from lra import tasks
from lra.errors import UserError
from lra.tasks import image, pixels

COUNTS = {"train": 12, "validation": 4, "test": 4}


def real_images():
    """The 20 images of CIFAR-10 in the package foolbox, with their labels: files cifar10_<number>_<label>.png."""
    spec = find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("the package foolbox is not installed")
    files = sorted((Path(spec.origin).parent / "data").glob("cifar10_*.png"))
    return [Image.open(file).convert("RGB") for file in files], [int(file.stem.split("_")[2]) for file in files]


def drawn_images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(20)], [
        i % 10 for i in range(20)
    ]


def write(root, monkeypatch, images, labels, column="img"):
    monkeypatch.setattr(image, "COUNTS", COUNTS)
    folder = root / "hub" / "uoft-cs" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    for half, rows in (("train", slice(0, 16)), ("test", slice(16, None))):
        encoded = []
        for picture in images[rows]:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({column: encoded, "label": pa.array(labels[rows], pa.int64())})
        pyarrow.parquet.write_table(table, folder / f"{half}-00000-of-00001.parquet")
    return folder


def prepare(root, **options):
    return tasks.build("image", **options).prepare(root, progress=False)


@pytest.mark.parametrize("make", [drawn_images, real_images])
def test_pixels_are_the_grey_values_in_raster_order(tmp_path, monkeypatch, make):
    images, labels = make()
    write(tmp_path, monkeypatch, images, labels)
    data = prepare(tmp_path)
    assert data.source == "local"
    assert data.counts == COUNTS
    tokens = np.concatenate([split.tokens for split in data.splits.values()])
    assert np.array_equal(tokens, [np.asarray(picture.convert("L")).reshape(-1) for picture in images])
    assert np.concatenate([split.labels for split in data.splits.values()]).tolist() == labels


def test_smaller_splits_are_the_first_part_and_black_can_be_a_pixel(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, *drawn_images())
    whole, part = prepare(tmp_path), prepare(tmp_path, black="pixel", train_size=3, test_size=1)
    assert part.counts == {"train": 3, "validation": 4, "test": 1}
    for name, split in part.splits.items():
        assert np.array_equal(split.tokens - 1, whole.splits[name].tokens[: len(split.labels)])


def test_grey_weighs_the_colours():
    colours = np.eye(3, dtype=np.uint8)[None] * 255
    assert pixels.grey(colours).tolist() == [[76, 150, 29]]
    assert pixels.grey(np.full((1, 1, 3), 255, np.uint8)) == 255


@pytest.mark.parametrize(
    ("cut", "complaint"), [(18, "has 2 images in test, expected 4"), (15, "has 15 images in train")]
)
def test_missing_images_are_refused(tmp_path, monkeypatch, cut, complaint):
    images, labels = drawn_images()
    write(tmp_path, monkeypatch, images[:cut], labels[:cut])
    with pytest.raises(UserError, match=complaint):
        prepare(tmp_path)


def test_a_surplus_is_refused(tmp_path, monkeypatch):
    images, labels = drawn_images()
    write(tmp_path, monkeypatch, images + images[:1], labels + labels[:1])
    with pytest.raises(UserError, match="has 5 images in test, expected 4"):
        prepare(tmp_path)


def test_a_broken_image_is_refused_in_one_line(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch, *drawn_images())
    file = folder / "test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file).to_pydict()
    table["img"][1] = {"bytes": table["img"][1]["bytes"][:60], "path": None}
    pyarrow.parquet.write_table(pa.table(table), file)
    with pytest.raises(UserError, match=r"uoft-cs/cifar10 cannot be read \(") as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_refused(tmp_path, monkeypatch):
    images, labels = drawn_images()
    images[2] = images[2].resize((28, 28))
    write(tmp_path, monkeypatch, images, labels)
    with pytest.raises(UserError, match=r"image 2 of uoft-cs/cifar10, train, has shape \(28, 28, 3\)"):
        prepare(tmp_path)


def test_a_file_of_another_schema_is_refused_in_one_line(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, *drawn_images(), column="image")
    with pytest.raises(UserError, match="uoft-cs/cifar10 has a row without img in train; it has ") as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_error_says_what_to_get_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=rf"dataset uoft-cs/cifar10 .*put DIR at {tmp_path}/hub/uoft-cs/cifar10"):
        prepare(tmp_path)
