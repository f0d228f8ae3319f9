"""Complete named configurations, one YAML file each."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).resolve().parent


def recipe_names() -> list[str]:
    """The recipes that come with Solar."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def board_names() -> list[str]:
    """The leaderboards that come with Solar."""
    return sorted(file.stem for file in (RECIPES / "leaderboards").glob("*.yaml"))
