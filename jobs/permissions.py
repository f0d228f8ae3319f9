"""Files and directories that others could write into: what is read from there would be theirs."""

from __future__ import annotations

import stat
from pathlib import Path

from jobs.config import ConfigError


def refuse_open_directory(path: Path) -> None:
    """ConfigError where everybody may write into the directory; the sticky bit, as /tmp has it, protects what is there.

    A directory that is not there yet is nobody's.
    """
    if not path.exists():
        return
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"{path}: everybody may write there, and so decide what is trained and registered: chmod o-w {path}"
        )


def refuse_open_token(file: Path) -> None:
    """ConfigError where others than its owner may write the file of a cluster's token."""
    if file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{file}: others may write this token, and so choose whose cluster it is: chmod go-w {file}")
