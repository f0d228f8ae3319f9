"""How many held-out requests a night measures: what the latest comparison found to be needed; and what it exports."""

from __future__ import annotations

import dataclasses
import datetime
import json
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.nightly import judge
from jobs.nightly.context import NightContext
from jobs.nightly.gate import Comparison
from jobs.nightly.judge import _enough_requests, challenger_export
from jobs.nightly.steps import Judgement, Outcome
from jobs.scorer.checksums import CHECKSUMS
from jobs.tracking.registry import EXPORT

COMPARED = Comparison(users=4_000, relative=0.0, low=-0.01, high=0.01, power=0.9, users_needed=3_000)


def night_of(directory, day: int) -> NightContext:
    config = load_config("nightly", "movielens-100k", ["--workspace", str(directory)])
    return NightContext.of(config, datetime.date(2026, 3, day), Console(), verbose=False)


def judged(night: NightContext, comparison: Comparison | None) -> None:
    main = night.config.model["name"]
    night.journal.write(
        Judgement(
            verdict="undecided", reasons=("few",), primary="ndcg@10", metrics={main: {"requests": 6_000.0}},
            comparisons={"tonight": comparison} if comparison else {},
        )
    )  # fmt: skip
    night.journal.write(
        Outcome(
            date=night.date, verdict="undecided", reasons=("few",), champion_before="1", champion="1", run_dir=None,
            refused_days={}, left_out_days={},
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("needed", "expected"),
    # Twice the users, 1.5 requests each; at least twice the gate's 200 users; without a known spread nothing.
    [(3_000, 9_000), (10, 600), (None, None)],
)
def test_the_latest_comparison_says_how_many_are_enough(tmp_path, needed, expected):
    judged(night_of(tmp_path, 1), dataclasses.replace(COMPARED, users_needed=50_000))
    judged(night_of(tmp_path, 2), dataclasses.replace(COMPARED, users_needed=needed))
    found = _enough_requests(night_of(tmp_path, 4))
    assert found == (expected or 150_000)


def test_nights_without_a_comparison_and_later_ones_say_nothing(tmp_path):
    judged(night_of(tmp_path, 1), None)
    judged(night_of(tmp_path, 9), COMPARED)
    assert _enough_requests(night_of(tmp_path, 4)) is None


@pytest.mark.parametrize(("stored", "written"), [({"form": "softmax"}, False), ({"softmax": True}, True)])
def test_an_export_with_settings_of_an_earlier_version_is_written_again(tmp_path, monkeypatch, stored, written):
    night, exports = night_of(tmp_path, 1), []
    export = night.journal.directory / "export" / EXPORT
    export.mkdir(parents=True)
    known = {name: [] for name in ("features", "actions", "log_columns", "user_features")}
    settings = {"model": {"name": "solar", **stored}, "first_item_row": 2, "max_history": 9, **known}
    (export / "scorer.json").write_text(json.dumps(settings))
    (export / CHECKSUMS).write_text("{}")
    monkeypatch.setattr(judge, "export_model", lambda *arguments, **_: exports.append(arguments))
    trained: Any = SimpleNamespace(checkpoint=tmp_path / "step-00000001")
    monkeypatch.setattr(NightContext, "trained_config", lambda *_: night.config)
    assert challenger_export(night, trained) == export
    assert bool(exports) is written
    assert export.exists() is not written
