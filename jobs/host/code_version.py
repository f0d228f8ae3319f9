"""The commit of the running code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

GIT_COMMIT_VARIABLE = "SOLAR_GIT_COMMIT"
"""Environment variable of a submitted job: the commit from which its code was uploaded."""


def git_commit() -> str:
    """Commit of the running code, with `-dirty` if the checkout has uncommitted changes.

    Outside a git checkout: the commit that `solar submit` recorded when it uploaded the code, else `unknown`.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match", "no-tag"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(GIT_COMMIT_VARIABLE, "unknown")
    return commit.stdout.strip()
