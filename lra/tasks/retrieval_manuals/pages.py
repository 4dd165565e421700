"""Manual pages of the Linux man-pages project: from their source to plain text, and the pages that they refer to."""

import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lra.errors import UserError

PROJECT = "Linux man-pages"
"""In the title line of every page of the project, with its version."""

LINKS, DROPPED = "SEE ALSO", ("COLOPHON",)
"""The section that names other pages; sections that are the same everywhere."""

REFERENCE = re.compile(r"([\w.+:-]+) ?\((\d\w*)\)")
"""name(section)"""

JOINED, SPACED = ("BR", "RB", "BI", "IB", "IR", "RI"), ("B", "I", "SM", "SB")
"""Macros that set their arguments in alternating fonts, without and with spaces between them."""

NAMED = {"aq": "'", "lq": '"', "rq": '"', "dq": '"', "oq": "'", "cq": "'", "bu": "*", "em": "--", "en": "-"}
NAMED |= {"ha": "^", "ti": "~", "ga": "`", "+-": "+-", "sc": "§", "dg": "+"}
SINGLE = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "t": " ", "'": "'", "`": "`", "\\": "\\"}

ESCAPE = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|\*(?:\[\w*\]|\(..|.)|\[([^\]]*)\]|\((..)|(.))")
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')


class Page(NamedTuple):
    """A page without its header, its footer, and all references.

    key       "name.section"
    text      plain
    links     keys that its SEE ALSO names, whether or not they are pages
    version   of the project
    """

    key: str
    text: str
    links: frozenset[str]
    version: str


def read_all(folders: Iterable[Path]) -> dict[str, Page]:
    """The pages in man1 … man8 of these folders by key, in the order of the keys, with links to aliases resolved."""
    files = {file.name: file for folder in folders for file in folder.glob("man[1-8]/*.gz")}
    pages, aliases = {}, {}
    for name, file in sorted(files.items()):
        key = name.removesuffix(".gz")
        if file.is_symlink():
            aliases[key] = file.readlink().name.removesuffix(".gz")
        elif (page := read(file)) is not None:
            pages[key] = page
    return {key: page._replace(links=frozenset(aliases.get(k, k) for k in page.links)) for key, page in pages.items()}


def read(file: Path) -> Page | None:
    """One page; None for a page of another project, or an alias."""
    try:
        source = gzip.decompress(file.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no readable manual page ({error}); install its package again") from None
    title = re.search(rf"^\.TH .*{PROJECT} ([\w.-]+)", source, re.MULTILINE)
    if title is None:
        return None
    kept, links = [], set()
    for section, line in render(source):
        if section == LINKS:
            links |= {f"{name}.{number}" for name, number in REFERENCE.findall(line)}
        elif section not in DROPPED and (text := REFERENCE.sub("", line)).strip():
            kept.append(text)
    text = re.sub(r"[ \t]+", " ", "\n".join(kept))
    return Page(file.name.removesuffix(".gz"), text, frozenset(links), title[1])


def render(source: str) -> Iterator[tuple[str, str]]:
    """Section and text of each line that prints something."""
    section = ""
    for line in source.replace("\\\n", "").splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            arguments = [quoted.replace('""', '"') or plain for quoted, plain in ARGUMENT.findall(rest)]
            if macro == "SH":
                section = unescape(" ".join(arguments))
            line = printed(macro, arguments)
        text = unescape(line)
        if text.strip():
            yield section, text


def printed(macro: str, arguments: list[str]) -> str:
    """What a macro prints of its arguments."""
    if macro in JOINED:
        return "".join(arguments)
    if macro in (*SPACED, "SH", "SS"):
        return " ".join(arguments)
    return arguments[0] if macro == "IP" and arguments else ""


def unescape(line: str) -> str:
    r"""A line without its comment, with fonts dropped and escapes (\-, \(aq, \[lq]) as characters."""
    line = re.split(r"\\\"|\\#", line)[0]

    def character(found: re.Match[str]) -> str:
        name, single = found[1] or found[2], found[3]
        return NAMED.get(name, "") if name else SINGLE.get(single or "", "")

    return ESCAPE.sub(character, line)
