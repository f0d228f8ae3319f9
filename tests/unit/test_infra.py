"""What infra/ says can be true: files parse, name what exists, and repeat no version and no secret."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.config.reader import config_parser
from jobs.scheduling.kubernetes import CREDENTIALS_SECRET, TOKEN_SECRET, USER

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def test_dockerfile_copies_what_exists_and_its_ignore_file_lets_through():
    copied = [name for instruction, text in instructions() if instruction == "COPY" for name in text.split()[:-1]]
    assert set(copied) == {"pyproject.toml", "jobs", "models", "pipeline"}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    assert patterns == ["*", *(f"!{name}" for name in dict.fromkeys(copied)), "**/__pycache__"]


def test_dockerfile_has_a_target_for_cpu_and_gpu_that_ends_as_nobody_special():
    stages = [re.fullmatch(r"(\S+) AS (\S+)", text) for instruction, text in instructions() if instruction == "FROM"]
    names = [stage[2] for stage in stages if stage]
    assert len(names) == len(stages)
    assert {"cpu", "gpu", "mlflow"} <= set(names)
    known = {"${BASE}"}
    for stage in stages:
        assert stage is not None
        assert stage[1] in known
        known.add(stage[2])
    for target in ("cpu", "gpu", "mlflow"):
        body = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert f"\nUSER {USER}\n" in body
        assert "RUN" not in body.split(f"\nUSER {USER}\n")[1]
    assert f"useradd --uid {USER}" in DOCKERFILE


def test_base_image_is_the_only_version_in_the_dockerfile_and_fits_the_project():
    [base] = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    version = re.fullmatch(r"python:([\d.]+)-slim-\w+", base)
    assert version is not None
    assert version[1] in SpecifierSet(PROJECT["project"]["requires-python"])
    assert re.findall(r"[=:]=?\d+\.\d+", DOCKERFILE.replace(base, "")) == []


def test_dockerfile_finds_the_pins_that_it_takes_from_pyproject():
    commands = re.findall(r"\$\((sed -n '[^']+' pyproject\.toml)\)", DOCKERFILE)
    found = [subprocess.run(["sh", "-c", each], cwd=ROOT, capture_output=True, text=True).stdout for each in commands]
    groups = PROJECT["dependency-groups"]
    assert found[0].split() == groups["pip"]
    wanted = [*PROJECT["project"]["dependencies"], *groups["dev"]]
    assert found[1].split() == [pin for pin in wanted if pin.startswith(("mlflow==", "boto3=="))]
    for group in re.findall(r"--group (\S+)", DOCKERFILE):
        assert group in groups
    for extra in re.findall(r"'\.\[(\w+)\]'", DOCKERFILE):
        assert extra in PROJECT["project"]["optional-dependencies"]


def test_compose_names_every_tag_and_holds_no_password():
    compose = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        if "build" in service:
            assert (INFRA / "mlflow" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert f" AS {service['build']['target']}\n" in DOCKERFILE
        else:
            _, _, tag = service["image"].partition(":")
            assert re.search(r"\d", tag), name
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|STORE_URI", key):
                assert re.search(r"\$\{\w+:\?set \w+\}", value), f"{name}: {key}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
        for dependency in service.get("depends_on", {}):
            assert dependency in compose["services"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_cluster_launcher_s_file_is_valid_for_ray():
    cluster = yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text())
    validate_config(prepared := prepare_config(cluster))
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "docker": {"imge": "solar"}})
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def test_deepspeed_s_knobs_are_ours_and_the_engine_s():
    text = (INFRA / "deepspeed" / "README.md").read_text()
    keys = set(re.findall(r"`((?:parallel|optimizer|checkpoint|data)\.[\w.]+)`", text))
    assert len(keys) > 8
    assert keys <= {action.dest for action in config_parser("train", model="solar")._actions}
    engine = (ROOT / "jobs" / "training" / "dense_engine.py").read_text()
    for name in re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE):
        assert f'"{name.split(".")[0]}"' in engine


@pytest.mark.parametrize("document", sorted(INFRA.rglob("*.md")), ids=lambda path: str(path.relative_to(INFRA)))
def test_documents_name_files_that_exist(document):
    named = set(re.findall(r"(?<![\w/])((?:infra|tests|jobs)/[\w./-]+\.(?:py|yaml|md))", document.read_text()))
    named |= set(re.findall(r"infra/docker/Dockerfile", document.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    beside = re.findall(r"`((?:docker|ray|mlflow|deepspeed|kuberay)/[\w.]+)`", document.read_text())
    assert [name for name in beside if not (INFRA / name).exists()] == []


def test_directory_says_which_file_to_take_when():
    text = (INFRA / "README.md").read_text()
    for folder in (path for path in INFRA.iterdir() if path.is_dir()):
        assert f"`{folder.name}/" in text
    kuberay = (INFRA / "kuberay" / "README.md").read_text()
    assert TOKEN_SECRET in kuberay
    assert CREDENTIALS_SECRET in kuberay


def test_nothing_in_infra_names_a_registry_or_the_latest_of_anything():
    for file in INFRA.rglob("*"):
        if file.is_file():
            assert not re.search(r":latest|\b[\w-]+\.(?:io|com|dev)/[\w-]+/[\w-]+:", file.read_text()), file
