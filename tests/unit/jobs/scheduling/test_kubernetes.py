"""What `solar schedule --emit` writes: valid for Kubernetes and KubeRay, ours to parse again, and without secrets."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema.validators import validator_for

from jobs import cli
from jobs.cli import COMMANDS
from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.submission import job_command
from jobs.commands.cluster import submit_parser
from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.scheduling.kubernetes import RECIPES, USER

ROOT = Path(__file__).resolve().parents[4]
SCHEMAS = Path(os.environ.get("SOLAR_TEST_DATA", "no-test-data")) / "kuberay-schemas"
IMAGE = "registry.example/solar:1.2"
RECIPE = """
data: {name: shop}
source: {path: s3://logs/shop}
parallel: {num_workers: [2, 4], threads_per_worker: 2}
"""

Emit = Callable[..., dict[str, list[Any]]]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """A command in a directory that has mine.yaml; returns its exit code and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "nightly", cli.COMMANDS.get("nightly", cli.COMMANDS["train"]))
    (tmp_path / "mine.yaml").write_text(RECIPE)

    def call(*arguments: str) -> tuple[int, str]:
        code = cli.run(["schedule", *arguments])
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def emit(run, tmp_path) -> Emit:
    """{file: manifests} of `solar schedule mine.yaml --emit KIND ...`."""

    def call(kind: str, *arguments: str, recipe: str = "mine.yaml") -> dict[str, list[Any]]:
        head = ["--head", "http://ray-head:8265"] if kind == "cronjob" else []
        options = ["--cron", "0 3 * * 1-5", "--emit", kind, "--out", str(tmp_path / "out"), "--image", IMAGE]
        assert run(recipe, *options, *head, "--overwrite", *arguments) == (0, "")
        files = sorted((tmp_path / "out").iterdir())
        return {file.name: list(yaml.safe_load_all(file.read_text())) for file in files}

    return call


def of_kind(documents: dict[str, list[Any]], kind: str) -> Any:
    [found] = [each for manifests in documents.values() for each in manifests if each["kind"] == kind]
    return found


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields that Kubernetes would drop without a word."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{index}]")
    elif isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            if key in properties:
                yield from unknown_fields(item, properties[key], f"{path}.{key}")
            elif isinstance(others, dict):
                yield from unknown_fields(item, others, f"{path}.{key}")
            # metadata is typed by Kubernetes itself, not by the resource's schema.
            elif others is not True and not (schema == {"type": "object"} and path.endswith("metadata")):
                yield f"{path}.{key}"


@functools.cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((SCHEMAS / f"{kind}.v1.json.gz").read_bytes()))


needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="kuberay-schemas is not there: set SOLAR_TEST_DATA to a directory that has it"
)


@needs_schemas
@pytest.mark.parametrize("gpu", [[], ["--gpu"]])
@pytest.mark.parametrize("recipe", ["mine.yaml", "synthetic"])
def test_ray_s_kinds_are_valid_and_have_no_field_that_kuberay_does_not_know(emit, gpu, recipe):
    documents = emit("kuberay", *gpu, recipe=recipe)
    for kind in ("RayJob", "RayCronJob"):
        manifest, schema = of_kind(documents, kind), kuberay_schema(kind)
        # Not `jsonschema.validate`, which checks the schema itself each time: five seconds.
        validator_for(schema)(schema).validate(manifest)
        assert list(unknown_fields(manifest, schema)) == []
    cluster = of_kind(documents, "RayJob")["spec"]["rayClusterSpec"]
    assert list(unknown_fields({"spec": cluster}, kuberay_schema("RayCluster"))) == []


@needs_schemas
@pytest.mark.parametrize(
    "path",
    [
        ("spec", "submisionMode"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "serviceAcountName"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resource"),
    ],
)
def test_field_that_is_misspelt_would_be_found(emit, path):
    manifest = of_kind(emit("kuberay"), "RayJob")
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "x"
    [found] = unknown_fields(manifest, kuberay_schema("RayJob"))
    assert found.endswith(f".{path[-1]}")


@pytest.mark.parametrize("kind", ["cronjob", "kuberay"])
@pytest.mark.parametrize("recipe", ["mine.yaml", "synthetic"])
def test_kubernetes_own_kinds_are_valid(emit, kind, recipe):
    found = [each for manifests in emit(kind, recipe=recipe).values() for each in manifests]
    own = [each for each in found if not each["apiVersion"].startswith("ray.io/")]
    assert {each["kind"] for each in own} >= {"ServiceAccount", "Role", "RoleBinding"}
    for manifest in own:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    own[0]["metadta"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(own[0], "1.37", strict=True)


def pods(documents: dict[str, list[Any]]) -> dict[str, Any]:
    """{container name: pod spec} of all templates, however deep."""
    found: dict[str, Any] = {}

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "containers" in node:
                found[node["containers"][0]["name"]] = node
            for each in node.values():
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    walk(list(documents.values()))
    return found


@pytest.mark.parametrize("kind", ["cronjob", "kuberay"])
def test_pods_are_nobody_and_hold_no_secret(emit, tmp_path, kind):
    documents = emit(kind)
    names = {"cronjob": {"submit"}, "kuberay": {"ray-job-submitter", "ray-head", "ray-worker"}}[kind]
    assert pods(documents).keys() == names
    for spec in pods(documents).values():
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["serviceAccountName"] == "solar-mine"
        for container in spec["containers"]:
            assert container["image"] == IMAGE
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            secret = [each for each in container.get("env", []) if re.search("TOKEN$|PASSWORD|SECRET", each["name"])]
            assert all("secretKeyRef" in each["valueFrom"] for each in secret)
    assert not any(each["kind"] == "Secret" for manifests in documents.values() for each in manifests)
    assert of_kind(documents, "Role")["rules"] == []


def test_cronjob_submits_what_our_own_parsers_read(emit, tmp_path):
    documents = emit("cronjob", "--retries", "4", "--retry_minutes", "2", "--model.rank", "8", "--gpu")
    cron = of_kind(documents, "CronJob")["spec"]
    assert (cron["schedule"], cron["timeZone"], cron["concurrencyPolicy"]) == (
        "0 3 * * mon,tue,wed,thu,fri",
        "UTC",
        "Forbid",
    )
    [container] = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["solar"]
    command, *arguments = container["args"]
    split = arguments.index("--")
    options = submit_parser().parse_args(arguments[:split])
    assert command == "submit"
    assert (options.address, options.retries, options.retry_minutes) == ("http://ray-head:8265", 4, 2)
    assert options.tag == ["schedule=solar-mine"]
    night = in_pod(arguments[split + 1 :], container, documents, tmp_path)
    parsers = COMMANDS["nightly"].parsers(night[1:])
    made = job_command(night, parsers=parsers, directory=tmp_path, workspace=None, same_machine=False)
    assert made.arguments[0] == "nightly"
    config = parsed(night)
    assert (config.workspace, config.model["rank"], config.parallel.device) == ("/workspace", 8, "cuda")


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_entrypoint_of_a_cluster_of_its_own_is_read_by_our_own_parsers(emit, tmp_path, kind):
    documents = emit("kuberay", "--parallel.num_workers", "[1, 3]", "--workspace", "/mnt/solar")
    spec = of_kind(documents, kind)["spec"]
    job = spec["jobTemplate"] if kind == "RayCronJob" else spec
    exec_, python, flag, module, *arguments = shlex.split(job["entrypoint"])
    assert (exec_, python, flag, module) == ("exec", "python", "-m", "jobs.cli")
    [container] = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    config = parsed(in_pod(arguments, container, documents, tmp_path))
    assert config.workspace == mounts["workspace"] == "/mnt/solar"
    [workers] = job["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (1, 3, 3)
    assert (config.parallel.min_workers, config.parallel.max_workers) == (1, 3)


def in_pod(arguments: list[str], container: Any, documents: dict[str, list[Any]], tmp_path: Path) -> list[str]:
    """The arguments with the mounted files written where this test may: what a pod would see."""
    assert {"name": "recipe", "mountPath": RECIPES, "readOnly": True} in container["volumeMounts"]
    [volume] = [each for each in pods(documents)[container["name"]]["volumes"] if each["name"] == "recipe"]
    data = of_kind(documents, "ConfigMap")["data"]
    for item in volume["configMap"]["items"]:
        file = tmp_path / "pod" / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data[item["key"]])
    assert sum(RECIPES in argument for argument in arguments) == len(data)
    return [argument.replace(RECIPES, str(tmp_path / "pod")) for argument in arguments]


def parsed(arguments: list[str]) -> RunConfig:
    command, recipe, flag, *rest = arguments
    assert (command, flag) == ("nightly", "--catch-up")
    return load_config(command, recipe, rest)


def test_night_of_a_cluster_is_the_night_of_the_recipe_here(emit, run, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "more.yaml").write_text("model: {rank: 12}")
    documents = emit("kuberay", "--config=conf/more.yaml", "--seed", "3")
    job = of_kind(documents, "RayJob")["spec"]
    [container] = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    there = parsed(in_pod(shlex.split(job["entrypoint"])[4:], container, documents, tmp_path))
    here = load_config("nightly", "mine.yaml", ["--config=conf/more.yaml", "--seed", "3", "--workspace", "/workspace"])
    assert there.as_dict() | {"recipe": None} == here.as_dict() | {"recipe": None}
    assert there.name == "mine"


def test_versions_and_user_are_those_of_the_project(emit):
    job = of_kind(emit("kuberay"), "RayJob")["spec"]
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[data,train,default]=={job['rayClusterSpec']['rayVersion']}" in pins
    assert f"USER {USER}" in (ROOT / "infra" / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("kind", ["CronJob", "RayCronJob"])
def test_times_are_in_the_zone_of_the_log_s_days_unless_another_is_named(emit, kind):
    form = {"CronJob": "cronjob", "RayCronJob": "kuberay"}[kind]
    berlin = ["--data.prepare.daily.time_zone", "Europe/Berlin"]
    assert of_kind(emit(form, *berlin), kind)["spec"]["timeZone"] == "Europe/Berlin"
    assert of_kind(emit(form, *berlin, "--time_zone", "Asia/Tokyo"), kind)["spec"]["timeZone"] == "Asia/Tokyo"


def test_gpu_workers_ask_for_a_gpu_each_and_cpu_workers_for_none(emit):
    [gpu] = of_kind(emit("kuberay", "--gpu"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("1", "4")
    [cpu] = of_kind(emit("kuberay"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = cpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits
    assert int(limits["cpu"]) == 2
    assert ParallelConfig().threads_per_worker == 1


def test_one_off_waits_and_the_alpha_kind_says_what_it_is(emit, tmp_path):
    documents = emit("kuberay", "--retries", "1")
    job = of_kind(documents, "RayJob")["spec"]
    assert (job["suspend"], job["shutdownAfterJobFinishes"], job["backoffLimit"]) == (True, True, 1)
    head = (tmp_path / "out" / "raycronjob.yaml").read_text().split("\napiVersion")[0]
    assert "ALPHA and behind a feature gate that is OFF by default" in head
    assert "1.6 or later" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert "kubectl patch rayjob solar-mine " in (tmp_path / "out" / "rayjob.yaml").read_text()


def test_directory_in_use_is_refused_and_overwriting_leaves_nothing_behind(emit, run, tmp_path):
    emit("kuberay")
    (tmp_path / "out" / "notes.txt").write_text("ours")
    options = ["--cron", "0 3 * * *", "--out", "out", "--image", IMAGE, "--emit", "cronjob", "--head", "http://h:8265"]
    code, line = run("synthetic", *options)
    assert (code, line.count("\n")) == (2, 1)
    assert "--out out: is not empty: name another directory, or give --overwrite" in line
    assert run("synthetic", *options, "--overwrite") == (0, "")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["access.yaml", "cronjob.yaml", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["mine.yaml", "--image", IMAGE], "--emit kuberay: --out DIR is not given"),
        (["mine.yaml", "--out", "o"], "--emit kuberay: --image NAME:TAG is not given"),
        (["mine.yaml", "--out", "o", "--image", "solar"], "--image solar: name a tag"),
        (["mine.yaml", "--out", "o", "--image", "host:5000/solar"], "--image host:5000/solar: name a tag"),
        (["mine.yaml", "--out", "o", "--image", "solar:latest"], "--image solar:latest: name a tag"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--namespace", "A_b"], "--namespace A_b: must be lower-case"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--head", "http://h:1"], "--head: is for --emit cronjob"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--retry_minutes", "1"], "KubeRay retries without a wait"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--parallel.device", "cuda"], "parallel.device=cuda: workers"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--workspace", "here"], "workspace=here: must be absolute"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--data.events", "logs"], "data.events logs: is relative to"),
        (["mine.yaml", "--out", "o", "--image", IMAGE, "--notify.url", "https://h/secret"], "notify.url: a manifest"),
        (["secret.yaml", "--out", "o", "--image", IMAGE], "secret.yaml: has a password"),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(run, tmp_path, arguments, why):
    (tmp_path / "secret.yaml").write_text("tracking: {uri: 'https://u:secret@mlflow'}")
    code, line = run(*arguments, "--cron", "0 3 * * *", "--emit", "kuberay")
    assert (code, line.count("\n")) == (2, 1)
    assert why in line
    assert "h/secret" not in line
    assert not (tmp_path / "o").exists()


def test_options_of_manifests_are_refused_without_emit(run):
    code, line = run("synthetic", "--cron", "0 3 * * *", "--image", IMAGE)
    assert (code, "--image: is for manifests: give --emit" in line) == (2, True)
    code, line = run("synthetic", "--cron", "0 3 * * *", "--emit", "cronjob", "--out", "o", "--image", IMAGE)
    assert (code, "name the permanent Ray cluster: --head http://HOST:8265" in line) == (2, True)
