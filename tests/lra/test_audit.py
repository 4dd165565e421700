"""The audits find a shortcut where there is one, none where there is none; the network learns what a probe cannot."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from records import record, store

from lra import predictions
from lra.audit import command, control, picture, shortcuts
from lra.audit.answers import of_cells
from lra.audit.images import Images
from lra.record import Cell
from lra.tasks import Split, TaskData
from lra.tasks.pathfinder import Pathfinder

SMALL = control.Recipe(width=8, blocks=(1, 1), epochs=6, batch_size=32, learning_rate=1e-2)


def dots(count, seed):
    """Images 8 × 8 with two dots; label 1 where they are neighbours: each pixel alone says nothing."""
    random = np.random.default_rng(seed)
    images, labels = np.zeros((count, 8, 8), np.uint8), np.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        y, x = random.integers(0, 8), random.integers(0, 7)
        far = (y + random.integers(2, 7)) % 8, random.integers(0, 8)
        image[y, x], image[(y, x + 1) if label else far] = 255, 255
    return images, labels


def as_images(pixels, labels):
    return Images(pixels, labels.astype(bool), None)


def right(name, train, test):
    return (dict(shortcuts.guesses(train, test))[name] == test.labels).mean()


def test_the_network_learns_what_a_linear_probe_cannot():
    train, test = dots(512, 0), dots(400, 1)
    trained = control.train(train, test, SMALL, torch.device("cpu"))
    assert trained.right.mean() > 0.95
    assert trained.train_loss < 0.2
    assert right("linear probe", as_images(*train), as_images(*test)) < 0.65


def test_the_network_learns_nothing_from_labels_that_mean_nothing():
    images, labels = dots(512, 0)
    shuffled = np.random.default_rng(2).permutation(labels)
    trained = control.train((images, shuffled), dots(400, 1), SMALL, torch.device("cpu"))
    assert 0.35 < trained.right.mean() < 0.65


def test_every_eighth_of_a_batch_is_turned_and_mirrored_in_a_way_of_its_own():
    image = torch.arange(9).view(1, 3, 3)
    ways = control.symmetric(image.expand(16, 3, 3))
    assert len({way.numpy().tobytes() for way in ways}) == 8
    assert torch.equal(ways[0::2], ways[1::2])
    assert torch.equal(ways.flatten(1).sort().values, torch.arange(9).expand(16, 9))


@pytest.fixture
def noise():
    random = np.random.default_rng(0)
    markers, ends = random.integers(0, 8, (800, 2, 2)), random.integers(0, 8, (800, 3, 4, 2))
    pixels = random.integers(0, 255, (800, 8, 8)).astype(np.uint8)
    labels = random.integers(0, 2, 800).astype(bool)
    return pixels, labels, markers, ends


def halves(*noise):
    return (Images(*(part[rows] for part in noise)) for rows in (slice(0, 400), slice(400, None)))


def test_noise_is_guessed_by_nothing(noise):
    train, test = halves(*noise)
    found = {name: (guess == test.labels).mean() for name, guess in shortcuts.guesses(train, test)}
    assert len(found) == 10
    assert all(0.4 < accuracy < 0.6 for accuracy in found.values()), found


@pytest.mark.parametrize("name", ["ink", "linear probe", "connected components", "marker distance", "marker places",
                                  "flood fill"])  # fmt: skip
def test_a_shortcut_that_is_there_is_found(noise, name):
    pixels, labels, markers, ends = (array.copy() for array in noise)
    if name == "ink":
        pixels[labels] //= 2
    elif name == "linear probe":
        pixels[:, 3, 3] = np.where(labels, 200, 0)
    elif name == "connected components":
        pixels[:] = 0
        pixels[:, 1, 1] = 99
        pixels[labels, 1, 3] = 99
    elif name == "marker distance":
        markers[:, 0] //= 4
        markers[:, 1] = markers[:, 0] + np.where(labels, 1, 5)[:, None]
    elif name == "marker places":  # the one nearer to the middle lies left of it
        markers[:, 0] = np.stack([np.full(800, 4), np.where(labels, 2, 5)], axis=1)
        markers[:, 1] = np.random.default_rng(1).permuted([[0, 0], [7, 7]] * 400, axis=0)
        markers[::2] = markers[::2, ::-1]
    else:  # both markers on one bright row, or on two
        pixels[:] = 0
        pixels[:, [2, 5]] = 255
        markers[:] = np.array([[2, 0], [2, 7]])
        markers[~labels, 1, 0] = 5
    train, test = halves(pixels, labels, markers, ends)
    assert right(name, train, test) > 0.95


def test_ends_are_seen_as_far_as_the_audit_says(noise):
    """Whether the marked end runs towards the marked beginning takes two dashes to see."""
    pixels, _, markers, ends = (array.copy() for array in noise)
    run = np.random.default_rng(1).normal(size=(800, 2))
    ends = ends.astype(float)
    ends[:, 2, 1] = ends[:, 2, 0] + run
    labels = (run * (ends[:, 0, 0] - ends[:, 2, 0])).sum(-1) > 0
    train, test = halves(pixels, labels, markers, ends)
    one, two = (right(f"ends, dashes of each: {dashes}", train, test) for dashes in (1, 2))
    assert one < 0.6
    assert two > 0.75


def test_components_are_counted_in_each_image_apart():
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[:, 0, 0] = pixels[:, 1, 1] = 200
    pixels[1, 3, 3] = 50
    assert shortcuts.components(pixels, 20, 1, 0)[1].tolist() == [2, 3]
    assert shortcuts.components(pixels, 20, 2, 0)[1].tolist() == [1, 2]
    assert shortcuts.components(pixels, 60, 2, 0)[1].tolist() == [1, 1]
    assert shortcuts.components(pixels, 20, 1, 1)[1].tolist() == [1, 1]


def test_the_map_shows_where_the_other_marker_tells_the_label(tmp_path):
    """One in the middle, the other right of it where the label is 1, left where it is 0; a third without."""
    random = np.random.default_rng(0)
    labels = np.arange(900) % 2 == 0
    markers = np.full((900, 2, 2), 16)
    markers[:, 1] = np.stack([random.integers(0, 32, 900), np.where(labels, 28, 3)], axis=1)
    markers[::2] = markers[::2, ::-1]
    markers[600:] = 2
    shares, count = picture.share_of_ones(Images(np.zeros((900, 32, 32), np.uint8), labels, markers))
    assert count == 600
    assert (shares[:, 9] == 1).all()
    assert (shares[:, 1] == 0).all()
    assert np.isnan(shares[:, 4:7]).all()
    for name in ("one", "two"):
        picture.draw(tmp_path / name, name[:0], Images(np.zeros((900, 32, 32), np.uint8), labels, markers))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_answers_of_cells_on_these_data_are_told_apart_by_a_shortcut(tmp_path, capsys):
    """Six of eight items right, of which the shortcut knows four of five; other data, budgets, failures count not."""
    labels, best = np.zeros(8, int), np.array([0, 0, 0, 0, 1, 0, 0, 1])
    shortcut = np.arange(8) < 5
    about = {"task": "pathfinder", "correct": 6, "total": 8, "digest": "ours"}
    kept, lost = record("lln", seed=3, **about), record("softmax", **about)
    for made in (kept, lost):
        made["test"].pop("last")
    store(
        tmp_path,
        kept,
        lost,
        record("mra", **about | {"digest": "other"}),
        record("mra", budget="demo", **about),
        record("adamra", status="failed"),
    )
    predictions.write(Cell.of(kept).directory(tmp_path), predictions.Predictions(labels, best, best))
    config = SimpleNamespace(
        results_dir=tmp_path, protocol=SimpleNamespace(name="small"), budget=SimpleNamespace(name="published")
    )
    rows = {name: right.tolist() for name, right in of_cells(config, "ours", "places", shortcut)}
    assert rows == {"lln seed3, places right": [True] * 4 + [False], "lln seed3, places wrong": [True, True, False]}
    assert "softmax/seed0/predictions.npz is missing" in capsys.readouterr().err


def test_the_command_prints_and_records(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)

    def prepare(self, root, progress=True):
        splits = {
            name: Split(
                random.integers(0, 255, (count, 1024)).astype(np.uint8), (np.arange(count) % 2).astype(np.uint8)
            )
            for name, count in (("train", 24), ("validation", 2), ("test", 10))
        }
        return TaskData(splits, "0123456789abcdef", "release", root)

    monkeypatch.setattr(Pathfinder, "prepare", prepare)
    monkeypatch.setattr(control, "Recipe", lambda: SMALL)
    arguments = ["task.contour_length=9", "control.epochs=1", f"results_dir={tmp_path}"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("pathfinder, release, contours of 9, 24 / 2 / 10, 0123456789ab")
    assert "convolutional network" in out
    table = pd.read_csv(tmp_path / "audit.csv")
    assert table["audit"].tolist()[-5:] == ["commonest label", "ink", "linear probe", "connected components",
                                            "convolutional network"]  # fmt: skip
    assert table["published"].isna().all(), "what is published is of the hard level"
    record = json.loads((tmp_path / "audit" / "pathfinder-0123456789ab" / "record.json").read_text())
    assert record["control"]["recipe"]["epochs"] == 1
    assert command.main([*arguments, "control.epochs=0"]) == 0, "a second audit keeps the network of the first"
    again = json.loads((tmp_path / "audit" / "pathfinder-0123456789ab" / "record.json").read_text())
    assert again["rows"][-1] == record["rows"][-1]
    assert again["control"]["recipe"] == record["control"]["recipe"]
    capsys.readouterr()
    assert command.main([*arguments, "control.epochs=0", f"results_dir={tmp_path / 'other'}"]) == 0
    assert "convolutional network" not in capsys.readouterr().out


def test_the_networks_answers_are_told_apart_too_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "Recipe", lambda: SMALL)
    sizes = [f"task.{name}_size={size}" for name, size in (("train", 60), ("validation", 4), ("test", 40))]
    arguments = [*sizes, f"data.root={tmp_path}", f"results_dir={tmp_path}"]
    assert command.main([*arguments, "control.epochs=1"]) == 0
    table = pd.read_csv(tmp_path / "audit.csv").set_index("audit")
    whole, told, misled = (f"convolutional network{end}" for end in ("", ", places right", ", places wrong"))
    correct = table["value"] * table["items"]
    assert correct[whole] == pytest.approx(correct[told] + correct[misled])
    assert table["items"][whole] == table["items"][told] + table["items"][misled] == 40
    assert command.main([*arguments, "control.epochs=0"]) == 0
    again = pd.read_csv(tmp_path / "audit.csv").set_index("audit")
    assert again.loc[[whole, told, misled]].equals(table.loc[[whole, told, misled]])


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("task=image", "task=image has no audit; use one of pathfinder, pathx"),
        ("control.epochs=-1", "control.epochs=-1 is not possible; it must be an integer of at least 0"),
        ("task.contour_length=7", "task.contour_length=7 is not one of 14, 9, 6"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argument, complaint, capsys):
    assert command.main([argument]) == 2
    err = capsys.readouterr().err
    assert err.startswith(complaint.partition(" of ")[0][:30])
    assert err.count("\n") == 1
