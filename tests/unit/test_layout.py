"""The repository says the truth about itself: names resolve here, the README names what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["pipeline", "models", "jobs"])
def test_package_resolves_to_this_repository(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:pipeline|models|jobs|infra|tests)/[\w./-]*)`", text))
    tree = re.search(r"```\n(pyproject\.toml.*?)```", text, re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" ") and name.endswith("/"):
            folder = name
        named.add(f"{folder}{name}" if line.startswith(" ") else name)
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert missing == []


def test_every_command_in_the_readme_exists():
    from jobs.cli import COMMANDS
    from jobs.recipes import recipe_names

    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"\bsolar (\w+)", text.replace("solar-", "")))
    known = set(COMMANDS)
    used = {command for command in commands if re.search(rf"(`|\n\s*|/)solar {command}\b", text)}
    assert used <= known
    subjects = set(re.findall(r"solar (?:run|train|evaluate|register) ([\w./:@-]+)", text))
    recipes = {subject for subject in subjects - {"RECIPE", "CHECKPOINT"} if "/" not in subject}
    assert {recipe for recipe in recipes if not recipe.endswith(".yaml")} <= set(recipe_names())
    targets = set(re.findall(r"\bmake (\w+)", text))
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_versions_stand_in_pyproject_alone():
    pins = re.findall(r'"([a-z0-9-]+)(?:\[[\w,]+\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) > 20
    others = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("jobs/**/*.py"), *ROOT.glob(".ci/*")]
    repeated = [
        f"{path.name}: {name} {version}"
        for path in others
        for name, version in pins
        if f"{name}=={version}" in path.read_text()
    ]
    assert repeated == []
