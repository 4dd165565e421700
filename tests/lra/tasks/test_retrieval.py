"""The official AAN pairs are read exactly, line by line, or refused with file and line."""

import re

import pytest
import torch

from lra import tasks
from lra.errors import UserError
from lra.model import build_classifier
from lra.tasks import retrieval

COUNTS = {"train": 3, "validation": 1, "test": 2}
LINES = {
    "train": [
        b'1.0\tP01\tP02\tA "quoted start\tna\xc3\xafve',
        b'0.0\tP03\tP04\t\tno " end',
        b"1\tP05\tP06\ta\x0bb\x1cc\xc2\x85d\te\rf",
    ],
    "validation": [b"0\tP07\tP08\tx\ty"],
    "test": [b"1.0\tP09\tP10\tlong text\tshort", b"0.0\tP11\tP12\tq\tr"],
}


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    monkeypatch.setattr(retrieval, "COUNTS", COUNTS)


def write(root, folder=retrieval.FOLDERS[1], **lines):
    (root / folder).mkdir(parents=True)
    for split, name in retrieval.FILES.items():
        (root / folder / name).write_bytes(b"".join(line + b"\n" for line in lines.get(split, LINES[split])))
    return root / folder


def prepare(root, **options):
    return tasks.build("retrieval", **options).prepare(root, progress=False)


def decode(tokens):
    return bytes((tokens[tokens > 0].astype(int) - 1).tolist())


@pytest.mark.parametrize("folder", retrieval.FOLDERS)  # of the archive, extracted twice over; of the hub's mirror
def test_pairs_become_two_rows_of_bytes_plus_one(tmp_path, folder):
    write(tmp_path, folder)
    data = prepare(tmp_path, max_length=20)
    assert data.source == "release"
    assert data.counts == COUNTS
    train = data.splits["train"]
    assert train.tokens.shape == (3, 2, 20)
    assert train.labels.tolist() == [1, 0, 1]
    assert [[decode(side) for side in pair] for pair in train.tokens] == [
        [b'A "quoted start', b"na\xc3\xafve"],
        [b"", b'no " end'],
        [b"a\x0bb\x1cc\xc2\x85d", b"e\rf"],
    ]
    assert train.tokens[0, 1].tolist() == [byte + 1 for byte in b"na\xc3\xafve"] + [0] * 14


def test_heads_are_kept_and_smaller_splits_are_the_first_part(tmp_path):
    write(tmp_path)
    data = prepare(tmp_path, max_length=4, test_size=1)
    assert [decode(side) for side in data.splits["test"].tokens[0]] == [b"long", b"shor"]
    assert data.counts == {"train": 3, "validation": 1, "test": 1}


def test_the_complete_inner_folder_of_the_archive_wins(tmp_path):
    write(tmp_path)
    write(tmp_path, retrieval.FOLDERS[0], validation=[b"1\ta\tb\tinner\tfolder"])
    assert decode(prepare(tmp_path).splits["validation"].tokens[0, 0]) == b"inner"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"", "1 columns, expected 5"),
        (b"1\ta\tb\tc", "4 columns, expected 5"),
        (b"1\ta\tb\tc\td\te", "6 columns, expected 5"),
        (b"2\ta\tb\tc\td", "label b'2' is not 0 or 1"),
        (b"label\ta\tb\tc\td", "label b'label' is not 0 or 1"),
        (b"1\ta\tb\tc\t\xff", "a byte 255, which no UTF-8 text holds"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line, complaint):
    folder = write(tmp_path, train=[LINES["train"][0], line, LINES["train"][2]])
    with pytest.raises(UserError, match=re.escape(f"{folder / 'new_aan_pairs.train.tsv'}:2: {complaint}")):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("lines", "found"), [([], "0"), (LINES["test"][:1], "1"), (LINES["test"] * 2, "more than 2")], ids=len
)
def test_another_number_of_pairs_is_refused(tmp_path, lines, found):
    folder = write(tmp_path, test=lines)
    with pytest.raises(
        UserError, match=re.escape(f"{folder / 'new_aan_pairs.test.tsv'} holds {found} pairs, expected 2")
    ):
        prepare(tmp_path)


def test_a_missing_file_is_refused_though_the_others_are_there(tmp_path):
    file = write(tmp_path) / "new_aan_pairs.eval.tsv"
    file.unlink()
    with pytest.raises(UserError, match=re.escape(f"{file} cannot be read: No such file")):
        prepare(tmp_path)


def test_without_the_files_the_error_says_where_they_go(tmp_path):
    with pytest.raises(
        UserError, match=r"^task\.source=release: none of new_aan_pairs\.train\.tsv.*/lra_release/tsv_data"
    ):
        prepare(tmp_path, source="release")


def test_without_a_network_the_error_says_what_to_get_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=rf"OpenNLPLab/lra .* into {tmp_path}/lra_release/tsv_data$") as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_two_tower_model_takes_the_pairs(tmp_path):
    write(tmp_path)
    task = tasks.build("retrieval", max_length=16)
    data = task.prepare(tmp_path, progress=False)
    sizes = dict(
        dim=8, num_layers=1, num_heads=1, head_dim=8, ffn_dim=8, dropout=0.0, embedding_rows=257, max_length=16
    )
    model = build_classifier(
        sizes | {"pooling": "mean_full", "patch": None}, "softmax", {}, num_classes=2, two_towers=task.two_towers
    )
    assert model(torch.tensor(data.splits["train"].tokens).long()).shape == (3, 2)
