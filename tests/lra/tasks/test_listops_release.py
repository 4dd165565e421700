"""The official TSV files are read exactly, or refused with file and line."""

import re

import pytest

from lra import tasks
from lra.errors import UserError
from lra.tasks.listops import release

NESTED = "( ( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
"""`[MAX 2 9 [MIN 4 7 ] 0 ]` as the official files write it."""


def write(root, folder=release.FOLDERS[1], **lines):
    """The three files, with one expression each but for the splits given as lines."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, name in release.FILES.items():
        rows = lines.get(split, [f"{NESTED}\t9"])
        (root / folder / name).write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    return root / folder


def prepare(root, **options):
    return tasks.build("listops", **options).prepare(root, progress=False)


def test_expressions_become_these_tokens_and_labels(tmp_path):
    write(tmp_path, train=[f"{NESTED}\t9", "( ( ( [MED 1 ) 2 ) ] )\t1", "( ( ( [SM 9 ) 8 ) ] )\t7"])
    data = prepare(tmp_path)
    assert data.source == "release"
    assert data.counts == {"train": 3, "validation": 1, "test": 1}
    train = data.splits["train"]
    assert train.tokens.shape == (3, 2000)
    assert train.tokens[:, :11].tolist() == [
        [2, 8, 15, 1, 10, 13, 5, 6, 5, 0, 0],
        [3, 7, 8, 5, 0, 0, 0, 0, 0, 0, 0],
        [4, 15, 14, 5, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert not train.tokens[:, 11:].any()
    assert train.labels.tolist() == [9, 1, 7]


def test_parentheses_do_not_count_towards_the_length(tmp_path):
    write(tmp_path)
    assert prepare(tmp_path, max_length=4).splits["test"].tokens.tolist() == [[2, 8, 15, 1]]
    assert prepare(tmp_path, brackets="drop", max_length=8).splits["test"].tokens.tolist() == [
        [2, 8, 15, 1, 10, 13, 6, 0]
    ]


def test_the_complete_inner_folder_of_the_archive_wins(tmp_path):
    write(tmp_path, release.FOLDERS[1])
    write(tmp_path, release.FOLDERS[0], test=["3\t3"])
    assert prepare(tmp_path).splits["test"].labels.tolist() == [3]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (NESTED, "1 columns, expected 2"),
        (f"{NESTED}\t9\t9", "3 columns, expected 2"),
        ("", "1 columns, expected 2"),
        ("( [MAN 1 2 ] )\t1", "token '[MAN' is not one of [MIN [MAX [MED [SM ] 0 1 2 3 4 5 6 7 8 9"),
        ("( [MIN 10 2 ] )\t1", "token '10' is not one of"),
        ("( [MIN <pad> 2 ] )\t1", "token '<pad>' is not one of"),
        (f"{NESTED}\t10", "label '10' is not a digit 0 to 9"),
        (f"{NESTED}\tnine", "label 'nine' is not a digit"),
        (f"{NESTED}\t", "label '' is not a digit"),
        ("( )\t1", "the expression is empty"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line, complaint):
    folder = write(tmp_path, validation=[f"{NESTED}\t9", line, f"{NESTED}\t9"])
    with pytest.raises(UserError, match=re.escape(f"{folder / 'basic_val.tsv'}:3: {complaint}")):
        prepare(tmp_path)
    assert not [path for path in (tmp_path / "listops").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("content", ["", "Source\tTarget\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    file = write(tmp_path) / "basic_test.tsv"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{file} is empty")):
        prepare(tmp_path)


def test_a_file_without_its_header_is_refused(tmp_path):
    file = write(tmp_path) / "basic_test.tsv"
    file.write_text(f"{NESTED}\t9\n{NESTED}\t9\n")
    with pytest.raises(UserError, match=re.escape(f"{file}:1: the header is ")):
        prepare(tmp_path)


def test_a_binary_file_is_refused(tmp_path):
    file = write(tmp_path) / "basic_train.tsv"
    file.write_bytes(b"Source\tTarget\n\x1f\x8b\xff\xfe")
    with pytest.raises(UserError, match=re.escape(f"{file} is not a text file of ListOps")):
        prepare(tmp_path)


def test_a_missing_file_is_refused_though_the_others_are_there(tmp_path):
    file = write(tmp_path) / "basic_test.tsv"
    file.unlink()
    with pytest.raises(UserError, match=re.escape(f"{file} cannot be read: No such file")):
        prepare(tmp_path)


def test_without_the_files_the_error_says_where_they_go(tmp_path):
    with pytest.raises(UserError, match=rf"task\.source=release: none of .* is in {tmp_path}/lra_release/listops-1000"):
        prepare(tmp_path, source="release")


def test_prepared_arrays_outlive_the_official_files(tmp_path):
    folder = write(tmp_path)
    digest = prepare(tmp_path).digest
    for file in folder.iterdir():
        file.unlink()
    for source in ("auto", "release"):
        assert prepare(tmp_path, source=source).digest == digest


def test_a_changed_official_file_is_read_again(tmp_path):
    write(tmp_path)
    prepare(tmp_path)
    write(tmp_path, test=["3\t3"])
    assert prepare(tmp_path).splits["test"].labels.tolist() == [3]


def test_generation_can_be_asked_for_beside_the_official_files(tmp_path):
    write(tmp_path)
    sizes = {"train_size": 2, "validation_size": 1, "test_size": 1}
    assert prepare(tmp_path, source="generate", **sizes).source == "generate"


def test_damaged_official_arrays_are_refused(tmp_path):
    write(tmp_path)
    damaged = prepare(tmp_path).folder / "train_tokens.npy"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{damaged} is damaged"):
        prepare(tmp_path)
