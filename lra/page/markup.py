"""HTML from Python: every text escaped, every attribute quoted."""

import html


class Markup(str):
    """Text that is HTML already."""


VOID = ("input", "link", "meta")
"""Elements that have no content and no end."""


def tag(name: str, /, *content: str, **attributes: str | None) -> Markup:
    """`<name attribute="…">content</name>`; an attribute's trailing _ is dropped, None leaves it out, "" is a flag."""
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    head = "".join(f" {key}" if value == "" else f' {key}="{html.escape(value)}"' for key, value in given)
    return Markup(f"<{name}{head}>" if name in VOID else f"<{name}{head}>{join(*content)}</{name}>")


def join(*content: str, between: str = "") -> Markup:
    """Pieces one after the other; plain text is escaped."""
    return Markup(between.join(part if isinstance(part, Markup) else html.escape(part) for part in content))
