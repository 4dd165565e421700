"""Raw data from a package of Debian: installed, or fetched as a file, for which one need not be root."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from lra.errors import UserError

INSTALLED = Path("/")
"""Where packages are installed."""

SECONDS = 300
"""After which a fetch has failed."""


def find(root: Path, package: str, folder: str) -> Path | None:
    """`folder` of a package's files: under the data folder, where `fetch` puts it, or installed; None if nowhere."""
    places = Path(root) / "debian" / package / folder, INSTALLED / folder
    return next((place for place in places if place.is_dir() and any(place.iterdir())), None)


def fetch(root: Path, package: str, folder: str) -> Path:
    """The same, after `apt-get download` and `dpkg-deb --extract` if it is nowhere; UserError if they fail."""
    found = find(root, package, folder)
    if found is not None:
        return found
    by_hand = f"`apt-get install {package}` installs it, or put its files under {Path(root) / 'debian' / package}"
    if not available():
        raise UserError(f"Debian's package {package} is missing, and this machine has no apt-get; {by_hand}")
    place = Path(root) / "debian" / package
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        _run(["apt-get", "download", package], scratch, package, by_hand)
        files = list(Path(scratch).glob("*.deb"))
        _run(["dpkg-deb", "--extract", files[0].name, "files"], scratch, package, by_hand)
        with FileLock(place.with_name(f"{package}.lock")):  # two tasks, or two sizes of one, may fetch at once
            if not place.exists():
                (Path(scratch) / "files").rename(place)
    return place / folder


def available() -> bool:
    return all(shutil.which(tool) for tool in ("apt-get", "dpkg-deb"))


def _run(command: list[str], folder: str, package: str, by_hand: str) -> None:
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        reason = (ran.stderr.strip().splitlines() or ["no message"])[-1] if ran.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"Debian's package {package} could not be fetched ({command[0]}: {reason}); {by_hand}")
