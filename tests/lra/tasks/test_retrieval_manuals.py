"""Manual pages become text that names no other page, and pairs that are alike in all but the link."""

import gzip
from collections import Counter

import pytest

from lra import tasks
from lra.errors import UserError
from lra.tasks import debian
from lra.tasks.retrieval_manuals import pages, pairs

SOURCE = r"""
.\" Copyright
.TH open 2 2023-01-01 "Linux man-pages 6.03"
.SH NAME
open, creat \- open a file
.SH SYNOPSIS
.nf
.BI "int open(const char *" pathname ", int " flags \
");"
.fi
.SH DESCRIPTION
The \fIopen\fP call, see
.BR creat (2)
and \fBclose\fP(2), uses a \(aqflag\(aq.\" not shown
.TP
.B O_RDONLY
\[lq]read\[rq] only
.SH SEE ALSO
.BR close (2),
.BR fopen64 (3)
.PP
.IR "The Book"
.SH COLOPHON
This page is part of a release.
""".strip()

TEXT = """NAME
open, creat - open a file
SYNOPSIS
int open(const char *pathname, int flags);
DESCRIPTION
The open call, see
and , uses a 'flag'.
O_RDONLY
"read" only"""


def page(folder, key, source=SOURCE):
    file = folder / f"man{key.rpartition('.')[2][0]}" / f"{key}.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(source.encode()))
    return file


def manual(folder, count=60):
    """Pages p0.2, p1.2, … of which each names the next two, and one alias."""
    for number in range(count):
        links = ",\n".join(f".BR p{(number + step) % count} (2)" for step in (1, 2))
        title = f'.TH p{number} 2 2023-01-01 "Linux man-pages 6.03"'
        page(folder, f"p{number}.2", f"{title}\n.SH NAME\np{number} \\- page {number}\n.SH SEE ALSO\n{links}\n")


@pytest.fixture
def debian_folders(tmp_path, monkeypatch):
    """The packages as fetched, all pages in the first."""
    monkeypatch.setattr(debian, "available", lambda: False)
    monkeypatch.setattr(debian, "INSTALLED", tmp_path / "nowhere")
    folders = [tmp_path / "debian" / package / "usr/share/man" for package in ("manpages", "manpages-dev")]
    for folder in folders:
        folder.mkdir(parents=True)
    manual(folders[0])
    page(folders[1], "other.1", "no page of the project")
    return folders


def test_a_page_becomes_text_without_header_footer_or_references(tmp_path):
    read = pages.read(page(tmp_path, "open.2"))
    assert read is not None
    assert read.text == TEXT
    assert read.links == {"close.2", "fopen64.3"}
    assert read.version == "6.03"


def test_links_to_an_alias_are_links_to_its_page(tmp_path):
    page(tmp_path, "open.2")
    target = page(tmp_path, "fopen.3", SOURCE.replace(".TH open 2", ".TH fopen 3"))
    (target.parent / "fopen64.3.gz").symlink_to("fopen.3.gz")
    read = pages.read_all([tmp_path])
    assert set(read) == {"open.2", "fopen.3"}
    assert read["open.2"].links == {"close.2", "fopen.3"}


def test_pages_of_other_projects_and_aliases_by_text_are_left_out(tmp_path):
    assert pages.read(page(tmp_path, "ls.1", '.TH LS 1 "2022" "GNU coreutils"')) is None
    assert pages.read(page(tmp_path, "creat.2", ".so man2/open.2")) is None


def test_a_damaged_page_is_refused_by_name(tmp_path):
    file = page(tmp_path, "open.2")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{file} is no readable manual page"):
        pages.read(file)


def test_pairs_are_balanced_unlinked_where_they_say_so_and_of_disjoint_pages(debian_folders):
    read = pages.read_all(debian_folders)
    made = pairs.make(read, seed=0)
    seen = {}
    for name, found in made.items():
        assert Counter(pair.label for pair in found) == {0: len(found) // 2, 1: len(found) // 2}
        assert len({frozenset(pair[:2]) for pair in found}) == len(found)
        for pair in found:
            link = pair.second in read[pair.first].links or pair.first in read[pair.second].links
            assert link == bool(pair.label)
            assert pairs.split_of(pair.first, 0) == pairs.split_of(pair.second, 0) == name
            for key in pair[:2]:
                assert seen.setdefault(key, name) == name
    assert set(made) == {"train", "validation", "test"}


def test_the_first_pages_say_nothing_and_sections_match(debian_folders):
    made = pairs.make(pages.read_all(debian_folders), seed=1)
    for found in made.values():
        firsts = [Counter(pair.first for pair in found if pair.label == label) for label in (0, 1)]
        sections = [Counter(pairs.section(pair.second) for pair in found if pair.label == label) for label in (0, 1)]
        assert firsts[0] == firsts[1]
        assert sections[0] == sections[1]


def test_the_task_holds_the_text_of_its_pairs(debian_folders, tmp_path):
    data = tasks.build("retrieval_manuals", max_length=64).prepare(tmp_path, progress=False)
    assert data.splits["train"].tokens.shape[1:] == (2, 64)
    texts = {page.text.encode() for page in pages.read_all(debian_folders).values()}
    for split in data.splits.values():
        for side in split.tokens.reshape(-1, 64):
            assert bytes((side[side > 0].astype(int) - 1).tolist()) in texts
        assert split.labels.mean() == 0.5


def test_without_the_packages_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(debian, "available", lambda: False)
    monkeypatch.setattr(debian, "INSTALLED", tmp_path / "nowhere")
    with pytest.raises(UserError, match="Debian's packages manpages and manpages-dev are missing; install them"):
        tasks.build("retrieval_manuals").prepare(tmp_path, progress=False)
