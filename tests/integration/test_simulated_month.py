"""Four nights as cron would run them: killed in two steps, a bad day, a worse challenger, MLflow away.

tests/benchmarks/simulated_month.py does the same for a month, with more that goes wrong.
"""

from __future__ import annotations

from tests.support.daily_log import day_of
from tests.support.month_world import plan_of
from tests.support.simulated_month import Month


def test_four_nights_with_troubles_end_as_they_must(tmp_path):
    said: list[str] = []
    month = Month(tmp_path, plan_of(4), states=False, ray=False, tell=said.append)
    month.run(frozen_every=0)
    assert month.problems() == [], "\n".join(said)
    ended = [month.document(number, "night") for number in range(2, 6)]
    assert [night and night["verdict"] for night in ended] == ["promoted", "no_input", "refused", "promoted"]
    killed = [attempt for attempt in month.attempts if attempt.code == -9]
    assert len(killed) == 2
    repaired = month.document(5, "prepare")
    assert repaired is not None
    assert str(day_of(3)) in repaired["days"]
