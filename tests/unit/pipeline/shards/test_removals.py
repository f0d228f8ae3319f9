"""What a data set remembers of its removed states."""

from __future__ import annotations

import pytest

from pipeline.events import DataError
from pipeline.shards import removals


def test_the_latest_records_are_kept_and_found_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(removals, "_KEPT", 2)
    path = str(tmp_path)
    for numbers in ([1], [2, 4], [3, 5]):
        removals.record_removal(path, {number: f"f{number}" for number in numbers}, command=f"solar gc {numbers[0]}")
    found = [removals.removal_of(path, number) for number in range(1, 7)]
    assert [removal and removal.command[9:] for removal in found] == [None, "2", "3", "2", "3", None]
    assert removals.removals(path)[0].manifests == {2: "f2", 4: "f4"}


@pytest.mark.parametrize("content", [b"", b'{"manifests": {"2"', b"[]", b'{"manifests": {"2": "f"}}', b"\xff"])
def test_a_damaged_record_gives_no_reason_and_is_refused_where_all_are_needed(tmp_path, content):
    path, folder = str(tmp_path), tmp_path / "removals"
    removals.record_removal(path, {1: "f1"}, command="solar gc")
    (folder / "00000002.json").write_bytes(content)
    (folder / ".00000003.json-x1").write_text("left by a kill")
    assert removals.removal_of(path, 2) is None
    assert removals.removal_of(path, 1) is not None
    with pytest.raises(DataError, match=r"removals/00000002.json is damaged: .* remove it and the states"):
        removals.removals(path)
