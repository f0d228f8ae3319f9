"""The page of a night: what it says, from journals made by hand; that it needs nothing outside and runs nothing."""

from __future__ import annotations

import dataclasses
import datetime
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.config.reader import load_config
from jobs.nightly.journal import Journal
from jobs.nightly.report import write_report
from jobs.nightly.report_plots import reliability
from jobs.nightly.steps import Outcome
from jobs.training.results import RankedTargets, ScoredImpressions

SECTIONS = ["verdict", "comparison", "guards", "log", "metrics", "training"]
PICTURES = ["nights", "calibration", "lengths", "loss", "spectrum", "cost"]
FIRST = datetime.date(2026, 3, 1)
COMPARED = {"users": 212, "relative": 0.0213, "low": -0.0042, "high": 0.0461, "power": 0.31, "users_needed": 1234}
USER = 987_654_321


class Page(HTMLParser):
    """A page as a browser sees it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.headings: list[str] = []
        self._inside: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "img"):
            return
        self._open.append(tag)
        if tag == "section":
            self._inside.append(str(dict(attrs)["id"]))
            self.sections[self._inside[-1]] = ""

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "section":
            self._inside.pop()

    def handle_data(self, data):
        if self._inside:
            self.sections[self._inside[-1]] += data

    @property
    def pictures(self) -> list[str]:
        return [str(attributes["alt"]) for tag, attributes in self.tags if tag == "img"]


@dataclasses.dataclass
class Nights:
    """Nights made by hand."""

    config: Any
    root: Path

    def journal(self, number: int, *, ended: str | None = None, **documents: dict[str, Any]) -> Journal:
        journal = Journal(self.root, FIRST + datetime.timedelta(days=number))
        journal.directory.mkdir(parents=True)
        for step, document in documents.items():
            (journal.directory / f"{step}.json").write_text(json.dumps({"seconds": 2.5, **document}))
        if ended is not None:
            journal.write(Outcome(date=journal.date, verdict=ended, reasons=("r",), champion="1"))
        return journal

    def page(self, journal: Journal, **outcome: Any) -> Page:
        whole = {"verdict": "promoted", "reasons": ("better",), "champion_before": "4", "champion": "5", **outcome}
        path = write_report(self.config, self.root, journal, Outcome(date=journal.date, **whole))
        assert path == journal.directory / "report.html"
        return Page(path.read_text())


@pytest.fixture
def nights(tmp_path):
    def make(**requests: Any) -> Nights:
        recipe = tmp_path / "shop.yaml"
        recipe.write_text(f"workspace: {tmp_path}\ndata: {{name: shop, requests: {json.dumps(requests)}}}\n")
        return Nights(load_config("nightly", str(recipe), []), tmp_path / "nights")

    return make


def decision(primary: str, value: float, *, guards: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    metrics = {name: {primary: value * share, "logloss": None, "coverage": 0.5} for name, share in
               (("solar", 1.0), ("champion", 0.9), ("solar, history emptied", 0.5), ("popularity", 0.2))}  # fmt: skip
    guards = guards or [{"name": "LogLoss", "value": 2.5, "limit": "at most 3 (1.02 times)", "holds": True}]
    return {"verdict": "promoted", "reasons": ["better"], "primary": primary, "metrics": metrics,
            "comparisons": {"tonight": COMPARED, "together": COMPARED}, "guards": guards}  # fmt: skip


def prepared(**days: int) -> dict[str, Any]:
    counts = {
        day.replace("_", "-").strip("d"): {"read": n + 3, "accepted": n, "rejected": 1} for day, n in days.items()
    }
    return {"manifest": 4, "events": 4321, "days": counts, "refused": {}, "left_out": {}}


def write_run(run_dir: Path, result: Any, *, primary: str) -> dict[str, dict[str, Any]]:
    """What a night's training and evaluation leave, with `result` for both systems; the documents of the journal."""
    evaluation = run_dir / "evaluation"
    evaluation.mkdir(parents=True)
    columns = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    counts = {name: value for name, value in columns.items() if name not in arrays}
    for system in ("solar", "champion"):
        pq.write_table(pa.table(arrays), evaluation / f"{system}.parquet")
        (evaluation / f"{system}.json").write_text(json.dumps({"system": system, "counts": counts}))
    interval = {"value": 0.3, "low": 0.25, "high": 0.36}
    systems = {"solar": interval, "champion": interval}
    slices = [{"name": name, "users": 50, "weight": 70.0, "systems": systems} for name in
              ("all targets", "1-9 events", "10-99 events")]  # fmt: skip
    summary = {"task": "next_item", "split": "temporal", "primary": primary, "systems": ["solar", "champion"],
               "metrics": {}, "slices": slices, "intervals": systems, "ratios": {}}  # fmt: skip
    (evaluation / "summary.json").write_text(json.dumps(summary))
    spectrum = {"histories": 9, "rank": [1, 2], "quantiles": {"0.5": [0.7, 0.9]}}
    (evaluation / "spectrum.json").write_text(json.dumps(spectrum))
    rows = [{"kind": "step", "step": step, "loss": 3 / step} for step in (1, 2, 3)]
    rows += [{"kind": "valid", "step": 3, primary: 0.31}]
    (run_dir / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {"run_dir": str(run_dir), "checkpoint": str(run_dir), "key": "k", "mlflow_run_id": "r", "requests": {},
               "training": {}, "steps": 3, "events": 900, "train_seconds": 1.25, "why_cold": None}  # fmt: skip
    return {"train": trained, "evaluate": {"directory": str(evaluation), "reference": None, "latencies": [0.1, 0.2]}}


def impressions() -> ScoredImpressions:
    rng = np.random.default_rng(1)
    logit = rng.normal(size=400)
    return ScoredImpressions(
        user=np.full(400, USER), history_length=np.full(400, 12), logit=logit,
        label=(rng.random(400) < 1 / (1 + np.exp(-logit))).astype(float),
        skipped_requests=0, requests=40, recommended_items=9, catalogue_items=10,
    )  # fmt: skip


def targets() -> RankedTargets:
    numbers, flags = np.ones(30), np.zeros(30, bool)
    return RankedTargets(
        user=np.full(30, USER), request=np.arange(30), history_length=np.full(30, 12), rank_kept=numbers,
        rank_removed=numbers, tied=flags, repeat=flags, training_count=np.arange(30), log_loss=numbers,
        recommended_items=9, catalogue_items=10,
    )  # fmt: skip


def whole_night(made: Nights, tmp_path: Path, result: Any, *, primary: str) -> Journal:
    """A night with everything, after one that was promoted and one without input."""
    registered = {"champion": "1", "verdict": "promoted", "reasons": ["r"]}
    made.journal(0, ended="promoted", prepare=prepared(d2026_03_01=100), champion={"version": None},
                 decision=decision(primary, 0.3), register=registered)  # fmt: skip
    made.journal(1, ended="no_input")
    before = {"version": "4", "metrics": {primary: 0.2718}, "primary": primary}
    days = prepared(d2026_03_01=100, d2026_03_02=77, d2026_03_03=120)
    days |= {"refused": {"2026-02-27": "half is broken"}, "left_out": {"2026-02-26": "no files in dt=2026-02-26"}}
    documents = {"prepare": days, "champion": before, "decision": decision(primary, 0.4)}
    return made.journal(2, ended=None, **documents, **write_run(tmp_path / "run", result, primary=primary))


def test_night_of_next_item_has_every_section_and_picture_and_says_why_there_is_no_calibration(nights, tmp_path):
    made = nights(seen_items="kept")
    page = made.page(whole_night(made, tmp_path, targets(), primary="ndcg@10_seen_kept"))
    assert list(page.sections) == SECTIONS + PICTURES
    assert len(page.pictures) == 5
    assert "no labels" in page.sections["calibration"]
    assert "Promoted: version 5 serves from now on instead of version 4." in page.sections["verdict"]
    assert "better" in page.sections["verdict"]
    for figure in ("+2.13%", "-0.42%", "+4.61%", "212", "1,234", "0.31"):
        assert figure in page.sections["comparison"]
    assert "at most 3 (1.02 times)" in page.sections["guards"]
    assert "0.2718" in page.sections["metrics"]
    assert "challenger (solar)" in page.sections["metrics"]
    assert "from the weights of version 4" in page.sections["training"]


def test_log_of_the_day_tells_new_late_refused_and_missing_days(nights, tmp_path):
    made = nights(seen_items="kept")
    said = made.page(whole_night(made, tmp_path, targets(), primary="ndcg@10_seen_kept")).sections["log"]
    rows = [line for line in said.splitlines() if line.startswith("2026-03")]
    # The night of 03-02 had no input: its day came with the next one.
    assert [row[:10] + ("late" if "late" in row else "new" if "new" in row else "") for row in rows] == [
        "2026-03-01", "2026-03-02late", "2026-03-03new",
    ]  # fmt: skip
    assert "4,321 events" in said
    assert "2026-02-27: half is broken" in said
    assert "2026-02-26: no files in dt=2026-02-26" in said


def test_night_of_impressions_shows_calibration(nights, tmp_path):
    made = nights(task="impressions")
    page = made.page(whole_night(made, tmp_path, impressions(), primary="gauc"))
    assert len(page.pictures) == 6
    assert "GAUC" in page.sections["metrics"]


def test_page_needs_nothing_outside_and_shows_no_user(nights, tmp_path):
    made = nights(task="impressions")
    journal = whole_night(made, tmp_path, impressions(), primary="gauc")
    page = made.page(journal)
    text = (journal.directory / "report.html").read_text()
    assert "http" not in text
    assert "url(" not in text
    assert str(USER) not in text
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"} == set()
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert handlers == []


def test_same_journals_are_the_same_page(nights, tmp_path):
    made = nights(task="impressions")
    journal = whole_night(made, tmp_path, impressions(), primary="gauc")
    made.page(journal)
    first = (journal.directory / "report.html").read_bytes()
    made.page(journal)
    assert (journal.directory / "report.html").read_bytes() == first


def test_hostile_texts_are_shown_and_not_run(nights):
    made = nights(seen_items="kept")
    hostile = "<script>alert('x')</script><img src=http://evil>"
    guards = [{"name": hostile, "value": None, "limit": hostile, "holds": False}]
    log = prepared(d2026_03_01=100) | {"refused": {"2026-02-27": hostile}, "left_out": {"2026-02-26": hostile}}
    journal = made.journal(0, prepare=log, champion={"version": None},
                           decision=decision("ndcg@10_seen_kept", 0.3, guards=guards))  # fmt: skip
    page = made.page(journal, verdict="refused", reasons=[hostile])
    for section in ("verdict", "guards", "log"):
        assert hostile in page.sections[section]
    assert "script" not in {tag for tag, _ in page.tags}
    assert "NO" in page.sections["guards"]


def test_first_night_without_a_champion_compares_nothing(nights, tmp_path):
    made = nights(seen_items="kept")
    run = write_run(tmp_path / "run", targets(), primary="ndcg@10")
    run["train"]["why_cold"] = "there is no champion"
    alone = {**decision("ndcg@10_seen_kept", 0.3), "comparisons": {}, "guards": []}
    del alone["metrics"]["champion"]
    journal = made.journal(0, prepare=prepared(), champion={"version": None}, decision=alone, **run)
    page = made.page(journal, champion_before=None, champion="1")
    assert "Promoted: version 1 serves from now on." in page.sections["verdict"]
    assert "nothing to compare" in page.sections["comparison"]
    assert "from scratch, because there is no champion" in page.sections["training"]


def test_night_that_trained_nothing_says_so(nights):
    made = nights(seen_items="kept")
    undecided = {"verdict": "undecided", "reasons": ["no request to train on"], "comparisons": {}, "guards": []}
    log, champion = prepared(d2026_03_01=9), {"version": "4", "metrics": None}
    journal = made.journal(0, prepare=log, champion=champion, decision=undecided)
    page = made.page(journal, verdict="undecided", champion="4", reasons=undecided["reasons"])
    assert "Undecided: version 4 continues to serve." in page.sections["verdict"]
    assert "Nothing was trained" in page.sections["training"]
    assert page.pictures == ["Cost"]
    assert "No night has measured anything" in page.sections["nights"]


def test_run_that_is_gone_or_damaged_is_told_in_its_place(nights, tmp_path):
    made = nights(task="impressions")
    journal = whole_night(made, tmp_path, impressions(), primary="gauc")
    (tmp_path / "run" / "evaluation" / "champion.parquet").write_bytes(b"half a file")
    (tmp_path / "run" / "evaluation" / "summary.json").unlink()
    page = made.page(journal)
    assert "Could not be drawn" in page.sections["calibration"]
    assert "Could not be drawn: FileNotFoundError" in page.sections["lengths"]
    assert page.pictures == ["Quality over the nights", "Training", "Energy of the histories", "Cost"]


def test_night_that_started_over_says_so(nights):
    made = nights(seen_items="kept")
    made.journal(0, prepare=prepared()).start_over()
    journal = made.journal(0, prepare=prepared(), champion={"version": None})
    made.page(journal, verdict="undecided", champion=None)
    assert "attempt 2 of this night" in (journal.directory / "report.html").read_text()


def test_reliability_of_calibrated_probabilities_lies_on_the_diagonal():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=50_000)
    label = (rng.random(50_000) < 1 / (1 + np.exp(-logit))).astype(float)
    predicted, observed, half = reliability(logit, label)
    assert len(predicted) == 10
    assert (np.diff(predicted) > 0).all()
    # Ten intervals of 95 %: twice their half width is left by one in 16,000.
    assert (np.abs(predicted - observed) < 2 * half).all()
    overconfident, _, _ = reliability(3 * logit, label)
    assert abs(overconfident[-1] - observed[-1]) > 5 * half[-1]
