"""Whether a finished cell is still what its command would train today: the code or its data may have changed since."""

import json
from functools import cache
from pathlib import Path

from lra import provenance, tasks
from lra.config import Config
from lra.record import Record, digest_of
from lra.tasks.cache import location


def stale(record: Record, config: Config) -> str:
    """Why the record of a finished cell is stale, in a few words; empty where it is not, or where nobody can know."""
    if record["status"] != "ok":
        return ""
    reasons = []
    code = record.get("code") or {}
    if code.get("digest") not in (None, _code()):
        reasons.append(f"code changed since {(code.get('revision') or '')[:12]}".strip())
    if len(code.get("trained_by") or ()) > 1:
        reasons.append("code changed while it was trained")
    now = _prepared_digest(config)
    if now and digest_of(record) not in ("", now):
        reasons.append(f"data changed from {digest_of(record)[:12]} to {now[:12]}")
    return "; ".join(reasons)


@cache
def _code() -> str:
    return provenance.code_digest()


def _prepared_digest(config: Config) -> str:
    """The digest of the data that is prepared for a cell, as its `meta.json` says; empty without any."""
    root = Path(config.data.root)
    try:
        task = tasks.build(config.task["name"], **config.task_options)
        meta = json.loads((location(root, task.name, task.recipe(root)) / "meta.json").read_text())
        return str(meta["digest"])
    except Exception:  # missing raw data, a damaged cache: the cell itself finds out and says so
        return ""
