"""What an earlier version wrote opens today and is written again with the same bytes: data, a run, a night's journal.

tests/frozen/shards-1 is the data set of tests/support/tiny.py; run-1 the run of its recipe on it, with one checkpoint;
night-1 the journals of three nights of tests/support/daily_log.py, and what the last one's report shows of its run. The
pictures are taken out of the pages, and the names of the machine's directories out of the journals. A sample is never
written again; another format gets another directory.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shutil
from pathlib import Path

import pytest

from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.data.inspect import inspect
from jobs.host.console import Console
from jobs.host.documents import as_json, from_json
from jobs.host.errors import UserError
from jobs.nightly.journal import Journal, past_nights
from jobs.nightly.report import write_report
from jobs.nightly.steps import STEPS, ChampionBefore, Judgement, Notified, Outcome, Prepared, TrainedChallenger
from jobs.runs.evaluate import Evaluated, read_result
from jobs.runs.record import RunRecord, read_record, record_of
from jobs.runs.result_tables import print_results
from jobs.runs.run_dir import run_shards, trained_run
from jobs.runs.summary import read_summary
from jobs.runs.train import train
from jobs.training.checkpoint import read_train_state
from pipeline.batches.request_index import settings_on
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import verify
from pipeline.shards.manifest import current_manifest

FROZEN = Path(__file__).parents[1] / "frozen"


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    """The frozen run and data set, as they lie in a workspace."""
    shutil.copytree(FROZEN / "shards-1", tmp_path / "workspace/shards/tiny")
    shutil.copytree(FROZEN / "run-1", tmp_path / "workspace/runs/tiny")
    monkeypatch.chdir(tmp_path)
    # The version that trained it read every event, whatever its label.
    return load_config("run", "workspace/runs/tiny/tiny.yaml", ["--data.requests.min_label", "0"])


@pytest.fixture
def nights(tmp_path, monkeypatch) -> list[Journal]:
    """The frozen nights, as they lie in a workspace."""
    shutil.copytree(FROZEN / "night-1/nightly", tmp_path / "workspace/nightly/shop")
    shutil.copytree(FROZEN / "night-1/run", tmp_path / "workspace/runs/shop-2026-03-04")
    monkeypatch.chdir(tmp_path)
    return past_nights(Path("workspace/nightly/shop"))


def test_no_sample_names_a_directory_of_the_machine_that_wrote_it():
    files = [file for name in ("shards-1", "run-1", "night-1") for file in (FROZEN / name).rglob("*") if file.is_file()]
    assert len(files) > 40
    assert not [file for file in files if re.search(rb"/(tmp|work|root|home)/", file.read_bytes())]


def test_data_set_opens_undamaged_with_its_events(tmp_path):
    shutil.copytree(FROZEN / "shards-1", tmp_path / "shards")
    assert verify(str(tmp_path / "shards")) == []
    data = Shards.open(str(tmp_path / "shards"))
    assert data.manifest.counts == {"read": 643, "accepted": 643, "duplicate": 0, "rejected": {}}
    assert (data.manifest.users, data.manifest.items) == (40, 60)
    assert sum(len(data.read(group).item) for group in range(data.num_groups)) == 643
    assert data.vocabulary.user_features == {"taste": ("new", "old")}
    (stored,) = (FROZEN / "shards-1/manifests").iterdir()
    found = current_manifest(str(tmp_path / "shards"))
    assert found is not None
    assert found.to_bytes() == stored.read_bytes()


def test_finished_run_is_found_and_reused(config, capsys):
    trained = train(config, Console(), resume=True)
    assert trained == dataclasses.replace(trained_run(config), reused=True)
    assert (trained.reused, trained.mlflow_run_id) == (True, "c7cfe68275a74e41be55b142b4e5b783")
    state = read_train_state(trained.checkpoint, checksums=True)
    assert (state.step, state.best_step, state.events, state.finished) == (8, 4, 1046, True)
    assert run_shards(config).manifest.fingerprint == "80eadaae7aa2ad65c378bd63ede6d301"
    assert inspect(str(trained.checkpoint), Console(), check=True, with_digest=False) == 0
    assert "every file has its size and checksum" in capsys.readouterr().out


def test_a_run_that_read_every_event_is_not_one_that_reads_positives_alone(config):
    requests = dataclasses.replace(config.data.requests, min_label=None)
    positives = dataclasses.replace(config, data=dataclasses.replace(config.data, requests=requests))
    with pytest.raises(UserError, match=r"data.requests.min_label is 0 there, 1 here\): choose another --name"):
        train(positives, Console(), resume=True)


def test_record_of_a_run_is_read_from_its_directory_and_from_its_checkpoint(config):
    record, content = read_record(config.run_dir), (FROZEN / "run-1/run.json").read_text()
    assert record is not None
    assert (record.manifest, record.mlflow_status, record.warm_start) == (1, "FINISHED", None)
    assert record.config["model"]["name"] == "solar"
    assert json.dumps(as_json(record), indent=1, sort_keys=True) == content
    of_checkpoint = record_of(config.run_dir / "step-00000008")
    assert of_checkpoint == dataclasses.replace(record, mlflow_run_id=None, mlflow_status=None)
    # An older one did not say what the run began from.
    older = {key: value for key, value in json.loads(content).items() if key != "warm_start"}
    assert from_json(RunRecord, older) == record


def test_evaluation_prints_its_tables(config, capsys):
    directory = config.run_dir / "evaluation"
    summary = read_summary(directory)
    assert summary.systems == ["solar", "solar, history emptied", "mean_pooling", "popularity"]
    assert summary.metrics["solar"]["ndcg@10"] == pytest.approx(0.26328, abs=1e-5)
    assert summary.intervals["solar"] == summary.slices[0].systems["solar"]
    assert summary.ratios["mean_pooling"].value == pytest.approx(1.18747, abs=1e-5)
    assert summary.requests_config == settings_on(run_shards(config), config.data.requests)
    result = read_result(directory, "solar", task="next_item")
    # Later versions count more than the stored one: the users behind each figure.
    metrics, stored = result.metrics(), summary.metrics["solar"]
    assert {name: metrics[name] for name in stored} == pytest.approx(stored, nan_ok=True)
    print_results(config, Console(), Evaluated(directory, summary, reused=True))
    shown = capsys.readouterr().out
    for cell in ("0.2633 (0.1645-0.3758)", "1.19 (0.75-2.03)", "0.0571 (0.0000-0.1327)"):
        assert cell in shown
    summary.write(Path())
    assert Path("summary.json").read_bytes() == (FROZEN / "run-1/evaluation/summary.json").read_bytes()


def test_journals_of_nights_are_read_step_by_step(nights):
    assert [(night.date.day, night.ended.verdict) for night in nights] == [
        (1, "promoted"), (2, "no_input"), (4, "promoted"),
    ]  # fmt: skip
    first, missed, last = nights
    assert first.read(ChampionBefore) == ChampionBefore(version=None, seconds=first.read(ChampionBefore).seconds)
    assert missed.ended == Outcome(
        date=datetime.date(2026, 3, 2), verdict="no_input", champion="1",
        reasons=("2026-03-02: no input (no files in dt=2026-03-02)",),
    )  # fmt: skip
    prepared, before, trained = last.read(Prepared), last.read(ChampionBefore), last.read(TrainedChallenger)
    assert (prepared.manifest, prepared.events, prepared.days["2026-03-04"].accepted) == (3, 1970, 667)
    assert (before.version, before.events_then, before.trained_until) == ("1", 673, 1_772_380_800_000)
    assert trained.requests.replay_share == 0.481798
    assert trained.training.warm_start == "workspace/runs/shop-2026-03-01/step-00000006"
    decision = last.read(Judgement)
    assert (decision.comparisons["together"].users, len(decision.guards)) == (70, 5)
    assert decision.comparisons["tonight"].low == pytest.approx(0.12668, abs=1e-5)


@pytest.mark.parametrize("kind", [*STEPS, Outcome, Notified], ids=lambda kind: kind.STEP)
def test_a_document_of_a_night_is_written_again_as_it_was(nights, kind, tmp_path):
    found = [night for night in nights if night.file(kind).exists()]
    assert len(found) >= 2
    for night in found:
        copy = Journal(tmp_path / "copy", night.date)
        copy.write(night.read(kind))
        assert json.loads(copy.file(kind).read_text()) == json.loads(night.file(kind).read_text())


def test_report_of_a_frozen_night_shows_the_same_figures(nights):
    config, last = load_config("nightly", str(FROZEN / "night-1/shop.yaml"), []), nights[-1]
    before = last.directory.joinpath("report.html").read_text()
    after = write_report(config, last.directory.parent, last, last.ended).read_text()
    for pattern in (r"<td>([-+\d.,%]+)</td>", r"<p>([\d,]+) ", r'<section id="(\w+)"', "<img (src)="):
        assert re.findall(pattern, before) == re.findall(pattern, after) != []
