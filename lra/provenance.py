"""Where a number comes from: code revision, versions, device."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "lightning", "hydra-core", "numpy", "numba")
SHARING = "LRA_CELLS_ON_DEVICE"
"""In the environment of a cell: how many cells the launcher lets share its device."""

AT_SUBMISSION = "LRA_CODE_AT_SUBMISSION"
"""In the environment of a cell of a sweep: the digest that the code had when the sweep was submitted."""

REPOSITORY = Path(__file__).parents[1]

CODE = ("run.py", "conf/**/*.yaml", "lra/**/*.py", "attention/**/*.py", "kernels/**/*.py")
NOT_CODE = ("conf/hydra/", "conf/logger/", "conf/suite/")
"""What numbers depend on: not tests, scripts and documents, not where and how cells are started."""


def code_revision() -> dict[str, Any]:
    """The git commit of the code and whether the checkout differs from it, both None where there is none; its digest.

    A copy that git does not describe (a container, a node's local disk, files copied over an older checkout) may name
    its commit in the environment, LRA_REVISION; that counts.
    """

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(REPOSITORY), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    named = os.environ.get("LRA_REVISION")
    revision = None if named else git("rev-parse", "HEAD")
    dirty = None if revision is None else bool(git("status", "--porcelain"))
    found = {"revision": named or revision, "dirty": dirty, "digest": code_digest()}
    submitted = os.environ.get(AT_SUBMISSION)
    return found if submitted is None else found | {"digest_at_submission": submitted}


def code_digest() -> str:
    """12 hexadecimal digits over every file that a number can depend on, committed or not."""
    sha = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in REPOSITORY.glob(pattern)):
        name = path.relative_to(REPOSITORY).as_posix()
        if not name.startswith(NOT_CODE):
            sha.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}, "cuda": torch.version.cuda}


def device_description(device: torch.device, count: int = 1) -> dict[str, Any]:
    """Name of the device, how many of it a cell uses, how many cells share it, and the driver (null on a CPU)."""
    name, driver = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)", None
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _cuda_driver()
    return {"name": name, "count": count, "sharing": int(os.environ.get(SHARING, "1")), "driver": driver}


def _cuda_driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
