"""A damaged scorer.json is told by file and key, whatever the damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.host.errors import UserError
from jobs.tracking.export_settings import read_object, read_settings

WHOLE: dict[str, Any] = {
    "model": {"name": "solar"}, "features": ["genre"], "actions": [""], "first_item_row": 2, "max_history": 7,
    "log_columns": ["user_id"], "user_features": [],
}  # fmt: skip


def complaint(directory: Path, content: str | bytes) -> str:
    file = directory / "scorer.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_settings(directory, uri="models:/shop/1")
    line = str(error.value)
    assert line.startswith(f"models:/shop/1: {file}")
    assert line.endswith(": restore the file, or register the model again")
    assert "\n" not in line
    return line


def test_an_export_without_user_features_is_one_of_the_first_versions(tmp_path):
    older = {key: value for key, value in WHOLE.items() if key != "user_features"}
    (tmp_path / "scorer.json").write_text(json.dumps(older))
    assert read_settings(tmp_path, uri="models:/shop/1") == older


@pytest.mark.parametrize("content", [json.dumps(WHOLE)[:40], "", b"\xff\xfe{}", b"\x00" * 30])
def test_a_file_that_was_cut_off_or_overwritten(tmp_path, content):
    assert "is not valid JSON (damaged or cut off)" in complaint(tmp_path, content)


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3"])
def test_another_document(tmp_path, content):
    assert f"must hold an object, it holds {content}" in complaint(tmp_path, content)


@pytest.mark.parametrize("key", [key for key in WHOLE if key != "user_features"])
def test_every_key_that_is_needed_is_missed(tmp_path, key):
    line = complaint(tmp_path, json.dumps({name: value for name, value in WHOLE.items() if name != key}))
    assert f"has no key {key!r}" in line


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model", "solar", "'model' must be an object, it is \"solar\""),
        ("model", {}, "'model' has no 'name'"),
        ("features", {"genre": 1}, "'features' must be a list"),
        ("features", None, "'features' must be a list, it is null"),
        ("max_history", "7", "'max_history' must be an integer, it is \"7\""),
        ("max_history", True, "'max_history' must be an integer, it is true"),
        ("user_features", 3, "'user_features' must be a list, it is 3"),
    ],
)
def test_a_value_of_another_type(tmp_path, key, value, told):
    assert told in complaint(tmp_path, json.dumps(WHOLE | {key: value}))


def test_a_file_that_is_not_there_or_no_file(tmp_path):
    (tmp_path / "scorer.json").mkdir()
    for name, reason in (("nowhere.json", "No such file"), ("scorer.json", "Is a directory")):
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read_object(tmp_path / name, uri="models:/shop/1")
