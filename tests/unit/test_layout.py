"""The repository says the truth about itself: names resolve here, the READMEs name what exists."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from jobs.commands.arguments import Parsers
from jobs.config.reader import values_of
from jobs.config.run_config import SECTIONS
from jobs.host.places import takes_option
from jobs.recipes import board_names, recipe_names
from models.zoo import MODELS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LONGEST_README = 200
FOLDERS = ("pipeline", "models", "jobs", "infra", "tests")
DOCUMENTS = [README, *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
RECIPE_COMMANDS = ("run", "train", "evaluate", "register", "nightly", "schedule")
FOR_EVERY_COMMAND = ("-v", "--verbose", "-h", "--help")
FILES = r"\.(?:py|md|html|yaml|toml|safetensors|parquet|jsonl?|log)$"

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fenced_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]


def solar_commands(document: Path) -> Iterator[list[str]]:
    """The arguments of every `solar ...` in code blocks, then in inline code; `submit -- COMMAND` gives both."""
    text = document.read_text()
    lines = [line for block in fenced_blocks(text) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    for line in [*lines, *inline_code(text)]:
        call = re.search(r"(?:^|[\s/=])solar (?=[\w-])(.*)", line)
        if call is None:
            continue
        arguments = shlex.split(re.sub(r"[\[\]](?=-|$|\s)|\.\.\.", " ", call[1]), comments=True)
        stop = next((i for i, word in enumerate(arguments) if word in ("&", "&&", "|", ";", "or")), len(arguments))
        outer = arguments[:stop]
        if outer[0] == "submit" and "--" in outer:
            place = outer.index("--")
            yield outer[:place]
            outer = outer[place + 1 :]
        if outer[0] != "COMMAND":
            yield outer


def settings_of(model: str) -> set[str]:
    return {f"model.{field.name}" for field in dataclasses.fields(MODELS[model][0])}


@functools.cache
def parsers_of(command: str, *chosen: str) -> Parsers:
    """`chosen`: the first arguments where they choose the parser, as `import SOURCE`."""
    return COMMANDS[command].parsers(chosen)


def is_known(option: str, command: str, arguments: list[str]) -> bool:
    parsers = parsers_of(command, *arguments[: COMMANDS[command].chosen_by])
    if option in FOR_EVERY_COMMAND or takes_option(parsers, option):
        return True
    # The parsers of a command that takes a recipe have the settings of one model.
    models = values_of("--model.name", arguments) or MODELS
    return option.startswith("--model.") and any(option[2:] in settings_of(model) for model in models)


@pytest.mark.parametrize("package", ["pipeline", "models", "jobs"])
def test_package_resolves_to_this_repository(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package


def test_the_front_door_is_short():
    assert len(README.read_text().splitlines()) <= LONGEST_README


def tree_of_readme() -> dict[str, str]:
    """{path: what the tree says of it}; lines that continue one are joined to it."""
    block = next(block for block in fenced_blocks(README.read_text()) if block.startswith("pyproject.toml"))
    told: dict[str, str] = {}
    folder = last = ""
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        assert indent in (0, 2) or indent > 10, line
        if indent > 10:
            told[last] += f" {line.strip()}"
            continue
        name, _, phrase = line.strip().partition(" ")
        if indent == 0 and name.endswith("/"):
            folder = name
        last = f"{folder}{name}" if indent else name
        told[last] = phrase.strip()
    return told


def test_the_tree_in_the_readme_names_every_room_and_only_what_exists():
    told = tree_of_readme()
    assert [path for path in told if not (ROOT / path).exists()] == []
    files = [f"{path}{name}" for path, phrase in told.items() for name in re.findall(r"[\w/]+\.(?:py|md|yaml)", phrase)]
    assert len(files) > 40
    assert [file for file in files if not (ROOT / file).is_file()] == []
    rooms = {f"{path.relative_to(ROOT)}/" for top in FOLDERS for path in (ROOT / top, *(ROOT / top).glob("*/"))}
    rooms = {room for room in rooms if room.count("/") == 1 or room.startswith(("pipeline/", "jobs/"))}
    rooms = {room for room in rooms if "__pycache__" not in room}
    modules = {str(path.relative_to(ROOT)) for top in ("pipeline", "jobs") for path in (ROOT / top).glob("*.py")}
    modules = {module for module in modules if not module.endswith("__init__.py")}
    assert sorted((rooms | modules) - set(told)) == []


def test_the_front_door_leads_to_every_readme():
    missing = [path for path in DOCUMENTS[1:] if "frozen" not in path.parts]
    reached: set[Path] = set()
    waiting = [README]
    while waiting:
        text = (document := waiting.pop()).read_text()
        named = {base / name for base in (ROOT, document.parent) for name in re.findall(r"`([\w/]+\.md)`", text)}
        waiting += [path for path in named & set(DOCUMENTS) if path not in reached]
        reached |= named
    assert [str(path.relative_to(ROOT)) for path in missing if path not in reached] == []


@each_document
def test_every_path_that_a_document_names_exists(document):
    text = document.read_text()
    named = set(re.findall(rf"(?<![\w/.<-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?)", text))
    # Beside the document, or from the root.
    named |= {word for code in inline_code(text) if re.fullmatch(r"[\w./-]+\.(?:py|md|html)", word := code.split()[0])}
    named |= {code for code in inline_code(text) if re.fullmatch(r"[\w-]+/", code)}
    made_or_yours = re.compile(r"workspace/|\bNAME\b")
    missing = [name for name in named if not ((ROOT / name).exists() or (document.parent / name).exists())]
    assert sorted(name for name in missing if not made_or_yours.search(name)) == []


@each_document
def test_every_command_that_a_document_names_exists(document):
    for arguments in solar_commands(document):
        name = arguments[0]
        if name == "COMMAND":
            continue
        assert name in COMMANDS, arguments
        if name in RECIPE_COMMANDS and len(arguments) > 1:
            subject = arguments[1]
            own = subject.isupper() or "/" in subject or subject.endswith(".yaml") or subject.startswith("-")
            assert own or subject in recipe_names(), arguments
        if name == "leaderboard" and len(arguments) > 1:
            assert arguments[1].isupper() or arguments[1] in board_names(), arguments
    makefile = (ROOT / "Makefile").read_text()
    code = "\n".join([*fenced_blocks(document.read_text()), *inline_code(document.read_text())])
    targets = set(re.findall(r"(?:^|\s)make ([a-z-]+)", code, re.MULTILINE))
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@each_document
def test_every_option_after_a_command_is_known_to_its_parsers(document):
    for name, *arguments in solar_commands(document):
        options = [word.split("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
        unknown = [option for option in options if name in COMMANDS and not is_known(option, name, arguments)]
        assert unknown == [], ["solar", name, *arguments]


@each_document
def test_every_setting_that_a_document_names_exists(document):
    sections = "|".join(["model", *SECTIONS])
    known = {action.dest for parser in parsers_of("train") for action in parser._actions}
    known |= {key.rsplit(".", count)[0] for key in known for count in range(1, key.count(".") + 1)}
    known = known.union(*(settings_of(model) for model in MODELS))
    named = {
        word.removeprefix("--").split("=")[0]
        for code in inline_code(document.read_text())
        for word in code.split()
        if re.fullmatch(rf"(?:--)?(?:{sections})\.[\w.]+(?:=.*)?", word) and not re.search(FILES, word)
    }
    assert sorted(named - known) == []


def test_the_table_of_commands_is_the_list_of_the_command_line():
    text = (ROOT / "jobs" / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `solar ")]
    told = {name for row in rows for name in re.findall(r"`solar ([\w-]+)", row.split(" | ")[0])}
    assert told == set(COMMANDS)


def test_the_table_of_models_is_the_list_of_the_zoo():
    told = re.findall(r"^\| `(\w+)` \| `\w+\.py`", (ROOT / "models" / "README.md").read_text(), re.MULTILINE)
    assert told == list(MODELS)
    assert all(dataclasses.is_dataclass(config) for config, _ in MODELS.values())


def test_versions_stand_in_pyproject_alone():
    pins = re.findall(r'"([a-z0-9-]+)(?:\[[\w,]+\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) > 20
    others = [*DOCUMENTS, ROOT / "Makefile", *ROOT.glob("jobs/**/*.py"), *ROOT.glob(".ci/*")]
    repeated = [
        f"{path.name}: {name} {version}"
        for path in others
        for name, version in pins
        if f"{name}=={version}" in path.read_text()
    ]
    assert repeated == []
