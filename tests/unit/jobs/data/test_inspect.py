"""What `solar inspect` says about events that were read with both labels."""

import dataclasses
from pathlib import Path

import pytest

from jobs.data import inspect as inspecting
from jobs.data.inspect import inspect
from jobs.host.console import Console
from pipeline import build
from pipeline.shards.leases import current_leases
from pipeline.shards.manifest import Manifest, manifest_name
from tests.support.serial import without_ray


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepare a log of these lines; its manifest."""
    without_ray(monkeypatch.setattr)

    def run(header, *lines) -> Manifest:
        (tmp_path / "log.csv").write_text("\n".join([header, *lines]) + "\n")
        config = build.PrepareConfig(buckets=1, max_rejected_ratio=0.5)
        return build.prepare(str(tmp_path / "log.csv"), str(tmp_path / "out"), config=config).manifest

    return run


@pytest.fixture
def shown(tmp_path, capsys):
    def run():
        assert inspect(Path(tmp_path / "out"), Console(), check=True, with_digest=True) == 0
        return capsys.readouterr().out

    return run


LABELLED = ("user_id,item_id,timestamp,label", "a,x,5,1", "a,x,5,0", "a,x,5,0", "b,x,6,0", "b,x,6,2")


def test_conflicting_events_are_counted_and_explained(prepared, shown):
    prepared(*LABELLED)
    text = shown()
    assert "5 read = 2 accepted + 1 duplicate + 1 conflicting + 1 rejected (invalid label 1)" in text
    assert "1 events were read with labels 0 and 1: they have label 1" in text
    assert "earlier version" not in text


def test_a_log_without_labels_says_nothing_of_conflicts(prepared, shown):
    prepared("user_id,item_id,timestamp", "a,x,5", "a,x,5")
    text = shown()
    assert "2 read = 1 accepted + 1 duplicate + 0 rejected" in text
    assert "conflicting" not in text


@pytest.mark.parametrize(("duplicates", "is_said"), [(0, False), (2, True)])
def test_an_earlier_data_set_says_where_it_may_have_kept_label_0(prepared, shown, tmp_path, duplicates, is_said):
    manifest = prepared(*LABELLED[:2], *LABELLED[2:3] * duplicates)
    counts = {"read": 1 + duplicates, "accepted": 1, "duplicate": duplicates, "rejected": {}}
    schema = {name: value for name, value in manifest.schema.items() if name != "kept_label"}
    files = [file | {"conflicting": 0} for file in manifest.files]
    older = dataclasses.replace(manifest, number=2, counts=counts, schema=schema, files=files)
    (tmp_path / "out" / manifest_name(2)).write_bytes(older.to_bytes())
    assert ("kept 0 and counted a duplicate (2 in all)" in shown()) == is_said


@pytest.mark.parametrize("what", ["verify", "digest"])
def test_what_is_being_checked_is_kept_by_gc(prepared, shown, tmp_path, monkeypatch, what):
    prepared(*LABELLED)
    original, held = getattr(inspecting, what), []

    def meanwhile(path, *, number):
        held.extend(current_leases(path))
        return original(path, number=number)

    monkeypatch.setattr(inspecting, what, meanwhile)
    shown()
    assert [(each.command, each.manifest) for each in held] == [("solar inspect", 1)]
    assert current_leases(str(tmp_path / "out")) == []
