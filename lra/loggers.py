"""Metric logs of a cell: viewers beside the record, never the source of a table."""

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lra.config import LoggerConfig


def build_logger(config: LoggerConfig, directory: Path, resolved: dict[str, Any]) -> Logger | bool:
    """The Lightning logger of a cell; `False` for none. W&B runs offline where there is no key."""
    if config.name == "csv":
        return CSVLogger(directory, name="logs")
    if config.name == "wandb":
        return WandbLogger(
            project=config.project or "lra",
            entity=config.entity,
            group=config.group,
            name="-".join(directory.parts[-3:]),
            save_dir=directory,
            offline=not _has_wandb_key(),
            config=resolved,
        )
    return False


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
