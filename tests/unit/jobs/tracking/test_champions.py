"""The alias `champion` over its life: promotions, a way back, and nobody sets it against what another did."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.host.errors import UserError
from jobs.tracking import champions
from jobs.tracking.champions import (
    ChampionChanged,
    champion,
    champion_at_night,
    changes,
    needed_versions,
    nights,
    note_night,
    promote,
    promote_by_hand,
    require_champion,
    roll_back,
)
from jobs.tracking.mlflow_runs import mlflow_client

NAME = "shop"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def client(store):
    """Versions 1 to 5 of a model, none of them the champion."""
    client = mlflow_client(store)
    client.create_registered_model(NAME)
    for number in range(1, 6):
        client.create_model_version(
            NAME, source=f"file:///m-{number}", tags={"solar.checkpoint": f"/runs/{number}/step"}
        )
    yield client
    client.delete_registered_model(NAME)


def serving(client) -> str | None:
    found = champion(client, NAME)
    return str(found.version) if found else None


def test_promotion_is_noted_once_and_takes_the_challenger_s_alias_away(client):
    assert champion(client, NAME) is None
    client.set_registered_model_alias(NAME, "challenger", "1")
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "2", expected="1", why="better")
    assert serving(client) == "2"
    assert [(each.version, each.before, each.why) for each in changes(client, NAME)] == [
        ("1", None, "first"), ("2", "1", "better"),
    ]  # fmt: skip
    assert client.get_registered_model(NAME).aliases == {"champion": 2}


def test_promotion_against_another_champion_than_the_decision_was_made_on_is_refused(client):
    promote(client, NAME, "1", expected=None, why="first")
    with pytest.raises(ChampionChanged, match="champion is version 1 by now, the decision was made against no version"):
        promote(client, NAME, "2", expected=None, why="late")
    require_champion(client, NAME, "1")
    with pytest.raises(ChampionChanged, match="against version 3"):
        require_champion(client, NAME, "3")
    assert serving(client) == "1"


def test_a_command_that_died_between_the_alias_and_its_note_is_made_good(client):
    promote(client, NAME, "1", expected=None, why="first")
    client.set_registered_model_alias(NAME, "champion", "2")
    promote(client, NAME, "2", expected="1", why="better")
    assert [(each.version, each.before) for each in changes(client, NAME)] == [("1", None), ("2", "1")]


class _Interrupted:
    """A client that lets others act right before or right after one of its calls, as if they had come in between."""

    def __init__(self, client, call: str, act, *, after: bool = False) -> None:
        self._client, self._call, self._act, self._after = client, call, act, after

    def __getattr__(self, name):
        original = getattr(self._client, name)
        if name != self._call:
            return original

        def called(*arguments, **named):
            act, self._act = self._act, lambda: None
            if not self._after:
                act()
            answer = original(*arguments, **named)
            if self._after:
                act()
            return answer

        return called


def interrupted(client, call: str, act, *, after: bool = False) -> Any:
    return _Interrupted(client, call, act, after=after)


def told(client) -> list[tuple[str, str | None]]:
    return [(each.version, each.before) for each in changes(client, NAME)]


def test_changes_are_ordered_by_their_sequence_whatever_the_clocks_say(client, monkeypatch):
    times = iter(["2026-03-02T12:00:00.000000Z", "2026-03-02T10:00:00.000000Z", "2026-03-02T11:00:00.000000Z"])
    monkeypatch.setattr(champions, "_now", lambda: next(times))
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "2", expected="1", why="by a machine whose clock is two hours behind")
    assert told(client) == [("1", None), ("2", "1")]
    assert set(needed_versions(client, NAME, latest=1)) == {"1", "2", "5"}
    assert roll_back(client, NAME, why="bad").version == serving(client) == "1"
    assert [each.sequence for each in changes(client, NAME)] == [1, 2, 3]


def test_changes_of_earlier_versions_have_no_sequence_and_come_first_by_their_times(client):
    for hour, version, before in ((9, "1", None), (10, "2", "1")):
        at = f"2099-03-02T{hour:02d}:00:00.000000Z"
        old = {"version": version, "before": before, "at": at, "why": "night", "rollback": False}
        client.set_registered_model_tag(NAME, f"solar.champion.{at}", json.dumps(old))
    client.set_registered_model_alias(NAME, "champion", "2")
    assert promote(client, NAME, "3", expected="2", why="better").sequence == 3
    assert told(client) == [("1", None), ("2", "1"), ("3", "2")]
    assert [roll_back(client, NAME, why="bad").version for _ in range(2)] == ["2", "1"]


def test_a_promotion_that_another_one_overtakes_says_that_it_lost(client):
    promote(client, NAME, "1", expected=None, why="first")
    other = interrupted(
        client, "set_registered_model_alias",
        lambda: client.set_registered_model_alias(NAME, "champion", "3"), after=True,
    )  # fmt: skip
    with pytest.raises(ChampionChanged, match="version 3 was made the champion at the same moment; version 2 is not"):
        promote(other, NAME, "2", expected="1", why="better")
    assert serving(client) == "3"
    assert told(client) == [("1", None)]
    with pytest.raises(UserError, match="look at `solar history shop` and decide again"):
        promote_by_hand(
            interrupted(
                client, "set_registered_model_alias",
                lambda: client.set_registered_model_alias(NAME, "champion", "4"), after=True,
            ), NAME, "2", why="x",
        )  # fmt: skip


def test_a_promotion_that_overtakes_another_one_comes_after_it_and_tells_whom_it_replaced(client):
    promote(client, NAME, "1", expected=None, why="first")
    overtaking = interrupted(
        client, "set_registered_model_alias", lambda: promote(client, NAME, "2", expected="1", why="better")
    )
    change = promote(overtaking, NAME, "3", expected="1", why="better, too")
    assert (change.before, change.sequence, serving(client)) == ("2", 3, "3")
    assert told(client) == [("1", None), ("2", "1"), ("3", "2")]
    assert roll_back(client, NAME, why="bad").version == "2"


def test_of_two_interleaved_promotions_one_stands_and_the_changes_agree_with_the_alias(client):
    promote(client, NAME, "1", expected=None, why="first")
    # Both have set the alias before either stores its change; the one whose alias was first stores it last.
    won = []
    slow = interrupted(
        client, "set_registered_model_alias",
        lambda: won.append(_promote_unseen(client, "3")), after=True,
    )  # fmt: skip
    with pytest.raises(ChampionChanged, match="version 3 was made the champion at the same moment"):
        promote(slow, NAME, "2", expected="1", why="better")
    assert (serving(client), told(client)) == ("3", [("1", None), ("3", "1")])
    assert won == ["1"]


def _promote_unseen(client, version: str) -> str | None:
    """Promote a version by a process that read the champion before the alias was set last."""
    client.set_registered_model_alias(NAME, "champion", "1")
    return promote(client, NAME, version, expected="1", why="better").before


def test_a_champion_that_another_tool_replaced_is_promoted_once_more_and_noted(client):
    promote(client, NAME, "1", expected=None, why="first")
    client.set_registered_model_alias(NAME, "champion", "5")
    promote(client, NAME, "1", expected="5", why="again")
    assert told(client) == [("1", None), ("1", "5")]
    assert roll_back(client, NAME, why="bad").version == "5"


def test_rollback_goes_to_the_champion_before_and_once_more_to_the_one_before_that(client):
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "2", expected="1", why="better")
    promote(client, NAME, "3", expected="2", why="better still")
    assert roll_back(client, NAME, why="bad").version == serving(client) == "2"
    assert {"1", "2"} <= set(needed_versions(client, NAME, latest=1))
    assert roll_back(client, NAME, why="bad as well").version == serving(client) == "1"
    with pytest.raises(UserError, match="solar promote shop --version N"):
        roll_back(client, NAME, why="bad, too")
    promote(client, NAME, "4", expected="1", why="better")
    assert roll_back(client, NAME, why="bad").version == "1"
    assert [(each.version, each.before, each.rollback) for each in changes(client, NAME)[2:]] == [
        ("3", "2", False), ("2", "3", True), ("1", "2", True), ("4", "1", False), ("1", "4", True),
    ]  # fmt: skip


def test_rollback_after_a_change_that_another_tool_made_goes_to_what_served(client):
    promote(client, NAME, "1", expected=None, why="first")
    client.set_registered_model_alias(NAME, "champion", "5")
    with pytest.raises(UserError, match="no champion of 'shop' before the current one is known"):
        roll_back(client, NAME, why="who was that")
    promote(client, NAME, "2", expected="5", why="better")
    assert [roll_back(client, NAME, why="bad").version for _ in range(2)] == ["5", "1"]


def test_promote_goes_to_any_version_and_rollback_undoes_it(client):
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "2", expected="1", why="better")
    assert promote_by_hand(client, NAME, "1", why="asked for").before == "2"
    assert roll_back(client, NAME, why="a mistake").version == serving(client) == "2"
    assert promote_by_hand(client, NAME, "4", why="asked for").before == "2"
    for version, text in (("4", "is the champion already"), ("9", "has no version 9; its versions: 1, 2, 3, 4, 5")):
        with pytest.raises(UserError, match=text):
            promote_by_hand(client, NAME, version, why="x")
    with pytest.raises(UserError, match="no registered model 'shoe': registered are shop"):
        roll_back(client, "shoe", why="x")


def test_nights_are_kept_with_the_model_and_tell_the_champion_of_a_date(client):
    for date, version in (("2026-03-01", "1"), ("2026-03-02", "2"), ("2026-03-04", None), ("2026-03-05", "9")):
        note_night(client, NAME, date, {"verdict": "promoted", "champion": version})
        note_night(client, NAME, date, {"verdict": "promoted", "champion": version})
    assert list(nights(client, NAME)) == ["2026-03-01", "2026-03-02", "2026-03-04", "2026-03-05"]
    assert champion_at_night(client, NAME, "2026-02-28") is None
    assert champion_at_night(client, NAME, "2026-03-01") == "1"
    assert champion_at_night(client, NAME, "2026-03-03") == "2"
    assert champion_at_night(client, NAME, "2026-03-04") is None
    # Version 9 is not in the registry any more.
    assert champion_at_night(client, NAME, "2026-03-06") is None


def test_versions_of_aliases_of_the_champion_before_and_of_the_latest_versions_are_needed(client):
    assert needed_versions(client, "nobody") == {}
    promote(client, NAME, "1", expected=None, why="first")
    promote(client, NAME, "2", expected="1", why="better")
    assert set(needed_versions(client, NAME, latest=2)) == {"1", "2", "4", "5"}
