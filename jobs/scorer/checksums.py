"""Checksums of a registered model's files: written at export, compared whenever the model is loaded.

    checksums.json    {"table-item.safetensors": sha256, ...} of every other file

This file becomes a part of the exported `scorer.py`. SHA-256 is in Python itself; xxhash is no package of a scorer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path

CHECKSUMS = "checksums.json"
COUNTERS = "item-counters.safetensors"
"""Counters of items by day, which a model with a prior reads. They are of the data, not of the model: the digest leaves
them and their checksum out, so that states stay valid when they are renewed."""


class DamagedModel(ValueError):
    """A file of a registered model is not what was registered; the message is one line that names it."""


def file_digests(directory: Path) -> dict[str, str]:
    """{name: SHA-256} of every file of an export. Reads every byte."""
    found = {}
    for file in sorted(directory.iterdir()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def export_digest(digests: dict[str, str]) -> str:
    """Digest of all exported files: models that score differently, with equal counters of the data, have different
    digests."""
    whole = hashlib.sha256()
    left_out = {COUNTERS, CHECKSUMS} if COUNTERS in digests else set()
    for name in sorted(digests.keys() - left_out):
        whole.update(f"{name} {digests[name]}\n".encode())
    return whole.hexdigest()[:32]


def write_checksums(directory: Path) -> None:
    """Write the checksums of the files that are there; the file appears whole."""
    digests, staged = file_digests(directory), directory / f".{CHECKSUMS}.tmp"
    staged.write_text(json.dumps({name: digests[name] for name in digests if name != CHECKSUMS}, indent=1))
    staged.rename(directory / CHECKSUMS)


def checked_digest(directory: Path) -> str | None:
    """`export_digest` after every file was compared with checksums.json. DamagedModel: a file differs, is missing, or
    is none of those that were registered.

    None for a model that was registered before there were checksums, which is logged once: nothing was compared.
    """
    file, fix = directory / CHECKSUMS, "restore the file, or register the model again"
    if not file.exists():
        if json.loads((directory / "scorer.json").read_text()).get("checksums"):
            raise DamagedModel(f"{file}: is missing: {fix}")
        _say_unchecked(directory)
        return None
    digests = file_digests(directory)
    try:
        listed = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise DamagedModel(f"{file}: is not a list of checksums, it is damaged: {fix}") from error
    for name in sorted(listed.keys() | {name for name in digests if not name.startswith(".")} - {CHECKSUMS}):
        if name not in digests:
            raise DamagedModel(f"{directory / name}: is missing: {fix}")
        if name not in listed:
            raise DamagedModel(
                f"{directory / name}: is not in {CHECKSUMS}: remove the file, or register the model again"
            )
        if digests[name] != listed[name]:
            raise DamagedModel(
                f"{directory / name}: its checksum is not that of its registration, it is damaged: {fix}"
            )
    return export_digest(digests)


@functools.cache
def _say_unchecked(directory: Path) -> None:
    logging.getLogger("solar").warning(
        f"{directory}: was registered without checksums, so damage would not be noticed: register the model again"
    )
