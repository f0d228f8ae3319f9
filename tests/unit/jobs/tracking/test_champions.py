"""The alias `champion` over its life: promotions, a way back, and nobody sets it against what another did."""

from __future__ import annotations

import pytest

from jobs.host.errors import UserError
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
