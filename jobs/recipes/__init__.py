"""Complete named configurations: one YAML file per recipe, and leaderboards."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).resolve().parent


def recipe_names() -> list[str]:
    """The names of the recipes in this package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def board_names() -> list[str]:
    """The names of the leaderboards in this package."""
    return sorted(file.stem for file in (RECIPES / "leaderboards").glob("*.yaml"))
