"""IMDB from parquet files of the hub's schema: exact bytes, the two validation rules, one clear line without them."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from lra import tasks
from lra.errors import UserError
from lra.tasks import hub, text

REVIEWS = 20


def review(half, index):
    return f"{half} {index:02} façade<br />"


def write(root, monkeypatch, count=REVIEWS, halves=("train", "test")):
    """Both halves sorted by label, as the hub has them, train in two files; and the third, unlabelled part."""
    monkeypatch.setattr(text, "REVIEWS", REVIEWS)
    folder = root / "hub" / "stanfordnlp" / "imdb" / "plain_text"
    folder.mkdir(parents=True)
    rows = {half: [(review(half, i), int(i >= REVIEWS // 2)) for i in range(count)] for half in halves}
    rows["unsupervised"] = [("no label", -1)]
    for half, members in rows.items():
        files = [members[:7], members[7:]] if half == "train" else [members]
        for number, part in enumerate(files):
            table = pa.table({"text": [t for t, _ in part], "label": pa.array([y for _, y in part], pa.int64())})
            pyarrow.parquet.write_table(table, folder / f"{half}-{number:05}-of-{len(files):05}.parquet")
    return folder


def prepare(root, **options):
    return tasks.build("text", **options).prepare(root, progress=False)


def read(split):
    """Text to label, decoded."""
    texts = [bytes((tokens[tokens > 0].astype(int) - 1).tolist()).decode() for tokens in split.tokens]
    return dict(zip(texts, split.labels.tolist(), strict=True))


def test_all_reviews_become_their_bytes_plus_one(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    data = prepare(tmp_path, max_length=30)
    assert data.source == "local"
    for half in ("train", "test"):
        assert read(data.splits[half]) == {review(half, i): int(i >= 10) for i in range(REVIEWS)}
    row = next(
        tokens for tokens in data.splits["train"].tokens if tokens[6] == ord("0") + 1 and tokens[7] == ord("3") + 1
    )
    assert row.tolist() == [byte + 1 for byte in "train 03 façade<br />".encode()] + [0] * 8


def test_validation_is_the_test_set_or_a_tenth_of_train(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    optimistic, clean = prepare(tmp_path), prepare(tmp_path, validation="train")
    assert optimistic.counts == {"train": 20, "validation": 20, "test": 20}
    assert read(optimistic.splits["validation"]) == read(optimistic.splits["test"])
    assert clean.counts == {"train": 18, "validation": 2, "test": 20}
    train, validation = read(clean.splits["train"]), read(clean.splits["validation"])
    assert train | validation == read(optimistic.splits["train"])
    assert sorted(validation.values()) == [0, 1]
    assert read(clean.splits["test"]) == read(optimistic.splits["test"])


def test_the_first_part_of_train_has_both_labels(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    for half in ("train", "test"):
        labels = prepare(tmp_path, train_size=6, test_size=6).splits[half].labels
        assert 2 <= labels.sum() <= 4


def test_the_head_is_kept(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    data = prepare(tmp_path, max_length=8)
    assert read(data.splits["train"]) == {f"train {i:02}": int(i >= 10) for i in range(REVIEWS)}


def test_a_missing_review_is_refused(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, count=REVIEWS - 1)
    with pytest.raises(UserError, match="imdb has 19 reviews in train, 9 of them good; expected 20, half of them good"):
        prepare(tmp_path)


def test_a_missing_file_is_refused(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, halves=("train",))
    with pytest.raises(UserError, match=r"holds no test-\*\.parquet; download the data set stanfordnlp/imdb"):
        prepare(tmp_path)


def test_a_truncated_file_is_refused(tmp_path, monkeypatch):
    file = write(tmp_path, monkeypatch) / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"imdb cannot be read \(") as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["auto", "hub"])
def test_without_a_network_the_error_says_what_to_get_and_where_to_put_it(tmp_path, source):
    with pytest.raises(
        UserError, match=rf"`hf download --repo-type dataset stanfordnlp/imdb .*put DIR at {tmp_path}/hub/"
    ):
        prepare(tmp_path, source=source)


def test_prepared_arrays_outlive_the_files(tmp_path, monkeypatch):
    folder = write(tmp_path, monkeypatch)
    digest = prepare(tmp_path).digest
    monkeypatch.setattr(hub, "at_hand", lambda *_: False)
    assert folder.exists()
    assert prepare(tmp_path).digest == digest
