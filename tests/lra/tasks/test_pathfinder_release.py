"""The official Pathfinder folders are read exactly and split by the seed-42 rule, or refused by name."""

import re

import numpy as np
import pytest
from PIL import Image

from lra import tasks
from lra.errors import UserError
from lra.tasks.pathfinder import release

COUNT = 20
SEED_42 = [2, 14, 18, 15, 1, 10, 0, 4, 6, 11, 8, 3, 7, 17, 13, 12, 19, 5, 16, 9]
"""torch.randperm(20) for seed 42: the rule that the published splits depend on."""


def picture(number):
    """An image that tells its number."""
    return np.full((32, 32), number, np.uint8)


def write(root, place="lra_release", level="curv_contour_length_14", batches=(0, 10, 2)):
    """A level of COUNT images in three batches; the metadata order is 0, 2, 10, by number and not by name."""
    folder = root / place / "pathfinder32" / level
    (folder / "metadata").mkdir(parents=True)
    numbers = np.array_split(np.arange(COUNT), 3)
    for batch, members in zip(sorted(batches), numbers, strict=True):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for index, number in enumerate(members):
            Image.fromarray(picture(number)).save(folder / "imgs" / str(batch) / f"sample_{index}.png")
            lines.append(f"imgs/{batch} sample_{index}.png {index} {number % 2} 1.0 14 4 2 0.5 1 1")
        (folder / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    return folder


def prepare(root, **options):
    return tasks.build("pathfinder", **options).prepare(root, progress=False)


def test_images_and_labels_are_split_by_the_rule(tmp_path):
    write(tmp_path)
    data = prepare(tmp_path)
    assert data.source == "release"
    assert data.counts == {"train": 16, "validation": 2, "test": 2}
    assert [split.tokens[:, 0].tolist() for split in data.splits.values()] == [
        SEED_42[:16],
        SEED_42[16:18],
        SEED_42[18:],
    ]
    for split in data.splits.values():
        assert np.array_equal(split.tokens, split.tokens[:, :1].repeat(1024, axis=1))
        assert np.array_equal(split.labels, split.tokens[:, 0] % 2)


def test_the_complete_inner_folder_of_the_archive_wins(tmp_path):
    write(tmp_path)
    inner = write(tmp_path, place="lra_release/lra_release")
    assert release.folder(tmp_path, 32, 14) == inner


def test_levels_are_folders_and_smaller_splits_the_first_part(tmp_path):
    write(tmp_path, level="curv_baseline")
    data = prepare(tmp_path, contour_length=6, train_size=3)
    assert data.splits["train"].tokens[:, 0].tolist() == SEED_42[:3]


def test_generation_can_be_asked_for_beside_the_official_folders(tmp_path):
    write(tmp_path)
    sources = {s: tasks.build("pathfinder", source=s).recipe(tmp_path).source for s in ("auto", "release", "generate")}
    assert sources == {"auto": "release", "release": "release", "generate": "generate"}


def test_the_image_that_is_empty_in_the_archive_is_left_out(tmp_path):
    folder = write(tmp_path, level="curv_baseline")
    (folder / "imgs" / "0" / "sample_172.png").touch()
    with (folder / "metadata" / "0.npy").open("a") as file:
        file.write("imgs/0 sample_172.png 172 1\n")
    assert sum(prepare(tmp_path, contour_length=6).counts.values()) == COUNT


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n half", b"no image"])
def test_a_broken_image_is_refused_by_name(tmp_path, content):
    image = write(tmp_path) / "imgs" / "2" / "sample_1.png"
    image.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(image))} is no readable image"):
        prepare(tmp_path)


def test_an_image_of_another_size_is_refused(tmp_path):
    image = write(tmp_path) / "imgs" / "2" / "sample_1.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(image)
    with pytest.raises(UserError, match=rf"{re.escape(str(image))} has \(64, 64\) pixels, expected 32"):
        prepare(tmp_path)


@pytest.mark.parametrize("line", ["imgs/0 sample_0.png 0", "imgs/0 sample_0.png 0 2", "imgs/0 sample_0.png 0 1.0", ""])
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line):
    file = write(tmp_path) / "metadata" / "10.npy"
    file.write_text("imgs/10 sample_0.png 0 1\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{file}:2: expected folder, file, number, label")):
        prepare(tmp_path)


def test_a_real_array_instead_of_text_is_refused(tmp_path):
    file = write(tmp_path) / "metadata" / "10.npy"
    np.save(file, np.arange(300))
    with pytest.raises(UserError, match=f"{re.escape(str(file))} is not a text file"):
        prepare(tmp_path)


def test_a_folder_without_metadata_is_refused(tmp_path):
    folder = write(tmp_path)
    for file in (folder / "metadata").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="metadata holds no file"):
        prepare(tmp_path)


def test_without_the_folder_the_error_says_where_it_goes(tmp_path):
    with pytest.raises(
        UserError, match=r"task\.source=release: .*lra_release/pathfinder32/curv_contour_length_14 is miss"
    ):
        prepare(tmp_path, source="release")
