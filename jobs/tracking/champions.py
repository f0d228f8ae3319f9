"""Which version of a registered model serves: the alias `champion`, its changes, and the return to an earlier version.

MLflow's registry is the only record. Each change of the alias is stored as a tag `solar.champion.TIME` of the
registered model, each night's decision as `solar.night.DATE`; both are small JSON documents. Changes are ordered by a
sequence number, because the clocks of two machines differ.

MLflow cannot set an alias on a condition: `promote` therefore reads it right before setting it, refuses if it is not
the champion with which the challenger was compared, and reads alias and changes again afterwards. Of two promotions at
the same time the one whose version serves afterwards stands; the other says that it lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.host.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
_CHANGE, _NIGHT = "solar.champion.", "solar.night."
TAG_LENGTH = 5000
"""Most characters of a tag's value in MLflow's stores."""


class ChampionChanged(Exception):
    """Another process or person has changed the alias; a decision that used the previous champion is not valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One change of the champion."""

    version: str
    """The new champion."""
    before: str | None
    """The previous champion; None = there was none."""
    at: str
    """Time of the change by the clock of its machine, UTC, ISO 8601; two of them cannot be compared."""
    why: str
    """The reason given."""
    rollback: bool = False
    """Whether the change returned to an earlier champion."""
    sequence: int = 0
    """Its place among the changes, from 1; 0 in records of earlier versions, which come first, by their times."""


def champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that serves; None if there is none yet."""
    version = _alias(client, name, CHAMPION)
    # In some stores the answer to a query by alias lacks the tags: query by version again.
    return client.get_model_version(name, version) if version else None


def promote(
    client: MlflowClient, name: str, version: str, *, expected: str | None, why: str, rollback: bool = False
) -> Change:
    """Make a version the champion, if `expected` (None = no version) is the champion now; returns the change. Safe to
    repeat.

    The change's `before` differs from `expected` if this promotion replaced another one that was made at the same time.
    ChampionChanged: another version is the champion now.
    """
    past, now = changes(client, name), _alias(client, name, CHAMPION)
    if now != version:
        require_champion(client, name, expected)
        client.set_registered_model_alias(name, CHAMPION, version)
    # Also if the alias is set already: a command may have died between setting it and storing the change.
    change = past[-1] if past else None
    if change is None or now != version or change.version != version:
        change = Change(
            version=version, before=expected if now == version else now, at=_now(), why=why[: TAG_LENGTH // 2],
            rollback=rollback, sequence=max([len(past), *(each.sequence for each in past)]) + 1,
        )  # fmt: skip
        key = f"{change.at}-{secrets.token_hex(4)}"
        client.set_registered_model_tag(name, f"{_CHANGE}{key}", _text(change))
        change = _settled(client, name, key, change)
    if _alias(client, name, CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    return change


def _settled(client: MlflowClient, name: str, key: str, change: Change) -> Change:
    """The change stored under this key, beside others that were made at the same time. ChampionChanged: another one
    stands."""
    serving, stored = _alias(client, name, CHAMPION), _changes(client, name)
    others = [each for other, each in stored.items() if other != key and each.sequence >= change.sequence]
    if serving != change.version:
        # If the other one is recorded as the successor of this one, both changes did happen, in this order.
        if not any(each.before == change.version for each in others):
            client.delete_registered_model_tag(name, f"{_CHANGE}{key}")
        raise ChampionChanged(
            f"{name}: version {serving} was made the champion at the same moment; version {change.version} is not the "
            "champion"
        )
    if others:
        change = dataclasses.replace(change, before=others[-1].version, sequence=others[-1].sequence + 1)
        client.set_registered_model_tag(name, f"{_CHANGE}{key}", _text(change))
    return change


def require_champion(client: MlflowClient, name: str, expected: str | None) -> None:
    """ChampionChanged unless this version (None = no version) is the champion."""
    now = _alias(client, name, CHAMPION)
    if now != expected:
        raise ChampionChanged(
            f"{name}: the champion is {f'version {now}' if now else 'no version'} by now, the decision was made "
            f"against {f'version {expected}' if expected else 'no version'}"
        )


def promote_by_hand(client: MlflowClient, name: str, version: str, *, why: str, rollback: bool = False) -> Change:
    """`solar promote`: the decision of a person. UserError: no such model or version, it is the champion already, or
    another promotion at the same time stands."""
    require_model(client, name)
    if or_none(lambda: client.get_model_version(name, version)) is None:
        known = sorted((str(v.version) for v in client.search_model_versions(f"name = '{name}'")), key=int)
        raise UserError(f"promote: model {name!r} has no version {version}; its versions: {', '.join(known)}")
    found = champion(client, name)
    if found is not None and str(found.version) == version:
        raise UserError(f"promote: version {version} of {name!r} is the champion already")
    expected = str(found.version) if found else None
    try:
        return promote(client, name, version, expected=expected, why=why, rollback=rollback)
    except ChampionChanged as error:
        raise UserError(f"promote: {error}: look at `solar history {name}` and decide again") from error


def roll_back(client: MlflowClient, name: str, *, why: str) -> Change:
    """`solar rollback`: return to the champion that the current one replaced; each further rollback goes one step
    further back. UserError: no such champion is known, or it is no longer in the registry."""
    require_model(client, name)
    found, succession = champion(client, name), _succession(changes(client, name))
    if found is None or len(succession) < 2 or succession[-1] != str(found.version):
        raise UserError(
            f"rollback: no champion of {name!r} before the current one is known: name a version with "
            f"`solar promote {shlex.quote(name)} --version N --why TEXT`"
        )
    return promote_by_hand(client, name, succession[-2], why=why, rollback=True)


def changes(client: MlflowClient, name: str) -> list[Change]:
    """Every change of the champion, in order."""
    return list(_changes(client, name).values())


def _changes(client: MlflowClient, name: str) -> dict[str, Change]:
    """{rest of the tag's name: the change}, in order."""
    found = {key: Change(**document) for key, document in _tagged(client, name, _CHANGE).items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].sequence, item[1].at)))


def _succession(past: Sequence[Change]) -> list[str]:
    """The champions in order, ending with the current one; a rollback removes the last one."""
    succession: list[str] = []
    for change in past:
        if change.before is not None and succession[-1:] != [change.before]:
            # The alias was set with another tool, which stores no change.
            succession.append(change.before)
        if change.rollback:
            succession.pop()
        elif succession[-1:] != [change.version]:
            succession.append(change.version)
    return succession


def note_night(client: MlflowClient, name: str, date: str, document: Mapping[str, Any]) -> None:
    """Store a night's decision with the registered model, which is created if needed. Safe to repeat."""
    text = json.dumps(document)
    assert len(text) <= TAG_LENGTH, "a night's decision is short"
    if or_none(lambda: client.get_registered_model(name)) is None:
        client.create_registered_model(name)
    client.set_registered_model_tag(name, f"{_NIGHT}{date}", text)


def nights(client: MlflowClient, name: str) -> dict[str, dict[str, Any]]:
    """{date: the night's decision}, oldest first."""
    return _tagged(client, name, _NIGHT)


def champion_at_night(client: MlflowClient, name: str, date: str) -> str | None:
    """The champion after the latest night on or before a date; None if unknown or no longer in the registry."""
    known = [decision.get("champion") for night, decision in nights(client, name).items() if night <= date]
    version = known[-1] if known else None
    if version is None or or_none(lambda: client.get_model_version(name, version)) is None:
        return None
    return version


def needed_versions(client: MlflowClient, name: str, *, latest: int = 3) -> dict[str, ModelVersion]:
    """{version: itself} of those that an alias refers to, of the previous champion, and of the `latest` ones."""
    model = or_none(lambda: client.get_registered_model(name))
    if model is None:
        return {}
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: -int(version.version))
    kept = {str(version.version) for version in versions[:latest]} | {str(v) for v in (model.aliases or {}).values()}
    kept |= set(_succession(changes(client, name))[-2:])
    return {str(version.version): version for version in versions if str(version.version) in kept}


def require_model(client: MlflowClient, name: str) -> None:
    """UserError, with the names of all registered models, unless the model is registered."""
    if or_none(lambda: client.get_registered_model(name)) is None:
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise UserError(f"no registered model {name!r}: registered are {known}")


def or_none(look_up: Callable[[], Any]) -> Any | None:
    """The registry's answer; None if it answers that there is no such entry. Other errors are raised."""
    from mlflow.exceptions import MlflowException

    try:
        return look_up()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def _text(change: Change) -> str:
    return json.dumps(dataclasses.asdict(change))


def _alias(client: MlflowClient, name: str, alias: str) -> str | None:
    found = or_none(lambda: client.get_model_version_by_alias(name, alias))
    return str(found.version) if found else None


def _tagged(client: MlflowClient, name: str, prefix: str) -> dict[str, dict[str, Any]]:
    """{rest of the tag's name: its document} of the registered model's tags with this prefix, sorted."""
    model = or_none(lambda: client.get_registered_model(name))
    tags = dict(model.tags) if model else {}
    return {key.removeprefix(prefix): json.loads(tags[key]) for key in sorted(tags) if key.startswith(prefix)}
