"""A tower's files can be joined into one scorer that needs torch alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.interface import ModelInput
from models.solar import Solar, SolarConfig
from models.zoo import MODELS as REGISTERED
from tests.support.model_inputs import NUM_FEATURES, NUM_USER_FEATURES, WIDTH, random_inputs

MODELS = Path(__file__).parents[3] / "models"


def needed_files(name: str) -> list[str]:
    """`name` after every file of models/ that it imports, directly or not."""
    files: list[str] = []
    for node in ast.parse((MODELS / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("models."):
            files += [file for file in needed_files(node.module.split(".")[1]) if file not in files]
    return [*files, name]


@pytest.mark.parametrize("tower", sorted(REGISTERED))
def test_towers_import_the_standard_library_and_torch_alone(tower: str) -> None:
    for file in needed_files(tower):
        for node in ast.walk(ast.parse((MODELS / f"{file}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                modules = [node.module or ""]
            for module in modules:
                root = module.split(".")[0]
                assert root in {"torch", "models"} or root in sys.stdlib_module_names, f"{file} imports {module}"


def test_joined_source_gives_the_same_logits() -> None:
    names: list[str] = []
    body = ["from __future__ import annotations"]
    for file in needed_files("solar"):
        source = (MODELS / f"{file}.py").read_text()
        tree = ast.parse(source)
        defined = [
            node.name if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else ast.unparse(node.targets[0])
            for node in tree.body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign))
        ]
        assert not set(defined) & set(names), f"{file} repeats a name of another file"
        names += defined
        lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"models", "__future__"}:
                for i in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[i] = ""
        body.append("\n".join(lines))
    sys.modules["joined_scorer"] = type(sys)("joined_scorer")
    try:
        exec(compile("\n".join(body), "joined_scorer", "exec"), sys.modules["joined_scorer"].__dict__)
        namespace = sys.modules["joined_scorer"].__dict__
        options: dict[str, Any] = {
            "width": WIDTH,
            "rank": 4,
            "num_actions": 3,
            "set_attention": True,
            "ffn_multiple": 1,
            "num_user_features": NUM_USER_FEATURES,
            "context_features": True,
        }
        model = Solar(SolarConfig(**options), num_features=NUM_FEATURES).eval()
        joined = namespace["Solar"](namespace["SolarConfig"](**options), num_features=NUM_FEATURES).eval()
        joined.load_state_dict(model.state_dict())
        inputs = random_inputs()
        fields = {name: getattr(inputs, name) for name in ModelInput.__dataclass_fields__}
        assert torch.equal(joined(namespace["ModelInput"](**fields)), model(inputs))
    finally:
        del sys.modules["joined_scorer"]
