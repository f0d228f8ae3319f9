"""Which version of a registered model serves: the alias `champion`, every change of it, and the way back.

MLflow's registry is the only record. A change of the alias is noted as a tag `solar.champion.TIME` of the registered
model, a night's decision as `solar.night.DATE`; both are small JSON documents. An alias cannot be set on a condition:
whoever sets it reads it again right before, and refuses where it is not what the decision was made against.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
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
    """Somebody else set the alias meanwhile; a decision against the champion before it is void."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A version became the champion."""

    version: str
    before: str | None
    """The champion until then."""
    at: str
    """UTC, ISO 8601."""
    why: str
    rollback: bool = False
    """It served before, and was returned to."""


def champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that serves, None where there is none yet."""
    version = _alias(client, name, CHAMPION)
    # The answer to an alias lacks the tags in some stores.
    return client.get_model_version(name, version) if version else None


def promote(
    client: MlflowClient, name: str, version: str, *, expected: str | None, why: str, rollback: bool = False
) -> None:
    """Make a version the champion if `expected` (None: nobody) is it now; the same again changes nothing.

    ChampionChanged: another version is.
    """
    now = _alias(client, name, CHAMPION)
    if now != version:
        require_champion(client, name, expected)
        client.set_registered_model_alias(name, CHAMPION, version)
    past = changes(client, name)
    # A command may have died between the alias and its note.
    if not past or past[-1].version != version:
        at = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        before = expected if now == version else now
        change = Change(version=version, before=before, at=at, why=why[: TAG_LENGTH // 2], rollback=rollback)
        client.set_registered_model_tag(name, f"{_CHANGE}{at}", json.dumps(dataclasses.asdict(change)))
    if _alias(client, name, CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def require_champion(client: MlflowClient, name: str, expected: str | None) -> None:
    """ChampionChanged unless this version (None: nobody) is the champion."""
    now = _alias(client, name, CHAMPION)
    if now != expected:
        raise ChampionChanged(
            f"{name}: the champion is {f'version {now}' if now else 'nobody'} by now, the decision was made against "
            f"{f'version {expected}' if expected else 'nobody'}"
        )


def promote_by_hand(client: MlflowClient, name: str, version: str, *, why: str, rollback: bool = False) -> Change:
    """`solar promote`: a person decides. UserError: no such model or version."""
    require_model(client, name)
    if or_none(lambda: client.get_model_version(name, version)) is None:
        known = sorted((str(v.version) for v in client.search_model_versions(f"name = '{name}'")), key=int)
        raise UserError(f"promote: model {name!r} has no version {version}; its versions: {', '.join(known)}")
    found = champion(client, name)
    if found is not None and str(found.version) == version:
        raise UserError(f"promote: version {version} of {name!r} is the champion already")
    promote(client, name, version, expected=str(found.version) if found else None, why=why, rollback=rollback)
    return changes(client, name)[-1]


def roll_back(client: MlflowClient, name: str, *, why: str) -> Change:
    """`solar rollback`: the champion that the present one was promoted over, which must still be in the registry; once
    more goes one further back. UserError."""
    require_model(client, name)
    found, standing = champion(client, name), _succession(changes(client, name))
    if found is None or len(standing) < 2 or standing[-1] != str(found.version):
        raise UserError(
            f"rollback: nothing is known of a champion of {name!r} before the present one: name a version with "
            f"`solar promote {name} --version N --why TEXT`"
        )
    return promote_by_hand(client, name, standing[-2], why=why, rollback=True)


def changes(client: MlflowClient, name: str) -> list[Change]:
    """Every change of the champion, oldest first."""
    return [Change(**document) for document in _tagged(client, name, _CHANGE).values()]


def _succession(past: Sequence[Change]) -> list[str]:
    """The champions that led to the present one, which is the last: a rollback takes one away."""
    standing: list[str] = []
    for change in past:
        if change.before is not None and standing[-1:] != [change.before]:
            # Somebody set the alias with another tool.
            standing.append(change.before)
        if change.rollback:
            standing.pop()
        else:
            standing.append(change.version)
    return standing


def note_night(client: MlflowClient, name: str, date: str, document: Mapping[str, Any]) -> None:
    """Keep a night's decision with the registered model; the same again changes nothing."""
    text = json.dumps(document)
    assert len(text) <= TAG_LENGTH, "figures and reasons of a night are few"
    if or_none(lambda: client.get_registered_model(name)) is None:
        client.create_registered_model(name)
    client.set_registered_model_tag(name, f"{_NIGHT}{date}", text)


def nights(client: MlflowClient, name: str) -> dict[str, dict[str, Any]]:
    """{date: what was decided}, oldest first."""
    return _tagged(client, name, _NIGHT)


def champion_at_night(client: MlflowClient, name: str, date: str) -> str | None:
    """The champion after the latest night up to a date, if it is still in the registry."""
    known = [told.get("champion") for night, told in nights(client, name).items() if night <= date]
    version = known[-1] if known else None
    if version is None or or_none(lambda: client.get_model_version(name, version)) is None:
        return None
    return version


def needed_versions(client: MlflowClient, name: str, *, latest: int = 3) -> dict[str, ModelVersion]:
    """The versions that an alias refers to, the champion before the present one, and the latest ones."""
    model = or_none(lambda: client.get_registered_model(name))
    if model is None:
        return {}
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: -int(version.version))
    kept = {str(version.version) for version in versions[:latest]} | {str(v) for v in (model.aliases or {}).values()}
    kept |= set(_succession(changes(client, name))[-2:])
    return {str(version.version): version for version in versions if str(version.version) in kept}


def require_model(client: MlflowClient, name: str) -> None:
    """UserError that names those that are there."""
    if or_none(lambda: client.get_registered_model(name)) is None:
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise UserError(f"no registered model {name!r}: there are {known}")


def or_none(look_up: Callable[[], Any]) -> Any | None:
    """What the registry answers, None if it says that there is none; any other trouble with it is raised."""
    from mlflow.exceptions import MlflowException

    try:
        return look_up()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _alias(client: MlflowClient, name: str, alias: str) -> str | None:
    found = or_none(lambda: client.get_model_version_by_alias(name, alias))
    return str(found.version) if found else None


def _tagged(client: MlflowClient, name: str, prefix: str) -> dict[str, dict[str, Any]]:
    model = or_none(lambda: client.get_registered_model(name))
    tags = dict(model.tags) if model else {}
    return {key.removeprefix(prefix): json.loads(tags[key]) for key in sorted(tags) if key.startswith(prefix)}
