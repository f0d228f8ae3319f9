"""What `solar inspect` says about events that were read with both labels."""

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import polars as pl
import pytest

from jobs.data import inspect as inspecting
from jobs.data.inspect import inspect
from jobs.host.console import Console
from jobs.host.errors import UserError
from pipeline import build
from pipeline.shards.leases import current_leases
from pipeline.shards.manifest import Manifest, manifest_name
from pipeline.sources.event_log import write_event_log
from tests.support.serial import command_without_ray


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepare a log of these lines; its manifest."""
    command_without_ray(monkeypatch.setattr)

    def run(header, *lines, items: str | None = None) -> Manifest:
        (tmp_path / "log.csv").write_text("\n".join([header, *lines]) + "\n")
        config = build.PrepareConfig(buckets=1, max_rejected_ratio=0.5)
        return build.prepare(str(tmp_path / "log.csv"), str(tmp_path / "out"), config=config, items=items).manifest

    return run


@pytest.fixture
def shown(tmp_path, capsys):
    def run():
        assert inspect(str(tmp_path / "out"), Console(), check=True, with_digest=True) == 0
        return capsys.readouterr().out

    return run


LOG = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [3]})
LABELLED = ("user_id,item_id,timestamp,label", "a,x,5,1", "a,x,5,0", "a,x,5,0", "b,x,6,0", "b,x,6,2")


def test_conflicting_events_are_counted_and_explained(prepared, shown):
    prepared(*LABELLED)
    text = shown()
    assert "5 read = 2 accepted + 1 duplicate + 1 conflicting + 1 rejected (invalid label 1)" in text
    assert "1 events were read with labels 0 and 1: they have label 1" in text
    assert "earlier version" not in text


def test_items_without_features_are_counted(prepared, shown, tmp_path):
    pl.DataFrame({"item_id": ["x"], "tag": ["t"]}).write_parquet(tmp_path / "items.parquet")
    prepared("user_id,item_id,timestamp", "a,x,5", "a,y,6", items=str(tmp_path / "items.parquet"))
    assert "item features tag (1 of 2 items have none)" in shown()


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


def test_times_are_dates_and_odd_ones_stay_numbers(prepared, shown):
    prepared("user_id,item_id,timestamp", "a,x,1700000000", "a,y,1700000001")
    assert "time range    2023-11-14T22:13:20Z to 2023-11-14T22:13:21Z\n" in shown()
    assert inspecting._times([0, 1 << 62]) == "0 to 4611686018427387904 ms since 1970 UTC"


def test_an_event_log_is_told_with_the_command_that_prepares_it(tmp_path):
    write_event_log(str(tmp_path / "log"), source={}, fill=lambda writer: writer.add_events(LOG))
    with pytest.raises(UserError, match=r"log: an event log: prepare it first: solar prepare --events .*log --out DIR"):
        inspect(str(tmp_path / "log"), Console(), check=False, with_digest=False)


def test_a_checkpoint_names_the_metric_by_which_it_is_the_best(tmp_path, capsys):
    for metric, says in ((0.13447, "best: step 4, validation ndcg@10 0.1345"), (None, "not validated yet")):
        state = {"step": 5, "best_step": 4, "best_metric": metric}
        config = {"data": {"requests": {"task": "next_item", "min_label": 0}}}
        document = {"train_state": state, "config": config, "world_size": 1, "manifest": 1, "tables": []}
        (tmp_path / "state.json").write_text(json.dumps(document))
        (tmp_path / "COMMIT").write_text(json.dumps({"files": []}))
        inspecting._print_checkpoint(tmp_path, Console())
        assert f"step          5 ({says})\n" in capsys.readouterr().out


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


def test_shards_in_an_object_store_are_shown(prepared, tmp_path, capsys):
    prepared(*LABELLED)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "out"), "/store/out", recursive=True)
    assert inspect("memory://store/out", Console(), check=True, with_digest=False) == 0
    text = capsys.readouterr().out
    assert "shards        memory://store/out, manifest 1" in text
    assert "every file has its size and checksum" in text


def test_of_a_run_the_latest_checkpoint_is_shown(tmp_path, capsys):
    """Of the one that an earlier version wrote."""
    shutil.copytree(Path(__file__).parents[3] / "frozen/run-1", tmp_path / "run")
    assert inspect(str(tmp_path / "run"), Console(), check=True, with_digest=False) == 0
    text = capsys.readouterr().out
    assert f"run           {tmp_path}/run, with step-00000008; the latest one:" in text
    assert f"checkpoint    {tmp_path}/run/step-00000008" in text
    assert "every file has its size and checksum" in text
    shutil.rmtree(tmp_path / "run/step-00000008")
    with pytest.raises(UserError, match=r"run: a run without a checkpoint yet$"):
        inspect(str(tmp_path / "run"), Console(), check=False, with_digest=False)
