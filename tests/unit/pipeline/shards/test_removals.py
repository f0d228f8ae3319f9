"""What a data set remembers of its removed states."""

from __future__ import annotations

from pipeline.shards import removals


def test_the_latest_records_are_kept_and_found_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(removals, "_KEPT", 2)
    path = str(tmp_path)
    for numbers in ([1], [2, 4], [3, 5]):
        removals.record_removal(path, {number: f"f{number}" for number in numbers}, command=f"solar gc {numbers[0]}")
    found = [removals.removal_of(path, number) for number in range(1, 7)]
    assert [removal and removal.command[9:] for removal in found] == [None, "2", "3", "2", "3", None]
    assert removals.removals(path)[0].manifests == {2: "f2", 4: "f4"}
