"""Four nights as cron would run them: killed in two steps, a bad day, a worse challenger, MLflow away.

tests/benchmarks/simulated_month.py does the same for a month, with more that goes wrong.
"""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("nights", [1, 2, 3, 4, 5, 28, 30])
def test_a_plan_of_any_length_sees_the_end_of_its_troubles(nights):
    plan = plan_of(nights)
    ends = [day + plan.repaired_after for day in plan.days("bad day")]
    ends += [day + plan.late_by for day in plan.days("late day")]
    ends += [day + 1 for day in plan.days("worse by design")]
    assert all(day <= plan.last for day in [*ends, *plan.troubles])
    assert len(plan.troubles) == {1: 1, 2: 1, 3: 2, 4: 4, 5: 4}.get(nights, 10)
