"""What is refused before anything is written to the registry."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.runs.evaluate import Evaluated
from jobs.runs.register import register
from jobs.runs.run_dir import Trained
from jobs.runs.summary import Summary


def test_a_model_whose_metric_is_nan_is_no_version(tmp_path):
    config = load_config("register", "movielens-100k", ["--workspace", str(tmp_path)])
    summary = Summary(
        part="test", task="next_item", split="leave_one_out", primary="ndcg@10", systems=["solar", "popularity"],
        metrics={"solar": {"ndcg@10": math.nan}, "popularity": {"ndcg@10": math.nan}}, slices=[], intervals={},
        ratios={},
    )  # fmt: skip
    trained = Trained(Path("unread"), Path("unread"), "unread", reused=False)
    evaluated = Evaluated(tmp_path / "evaluation", summary, reused=False)
    with pytest.raises(UserError, match=r"evaluation: ndcg@10 of solar is nan, no test request counts for it: not reg"):
        register(config, trained, evaluated, Console())
    assert list(tmp_path.iterdir()) == []
