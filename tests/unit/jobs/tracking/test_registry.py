"""A model's URI -> its version and files; whatever is missing is told in one line, without passwords."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow.artifacts
import pytest

from jobs.host.errors import UserError
from jobs.tracking.mlflow_runs import TrackingConfig, mlflow_client
from jobs.tracking.registry import fetch_model

REMOTE = "s3://bucket/models/m-1"


@pytest.fixture
def workspace(data, export, tmp_path):
    """A workspace whose store has model `shop`: version 1 (champion) on this disk, version 2 elsewhere, 3 damaged."""
    model, store = export(data), tmp_path / "workspace" / "mlflow"
    store.mkdir(parents=True)
    for number in (1, 3):
        shutil.copytree(model.directory, store / f"m-{number}" / "artifacts" / "model")
    (store / "m-3" / "artifacts" / "model" / "table-genre.safetensors").unlink()
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    client.create_registered_model("shop")
    for source in ((store / "m-1").as_uri(), REMOTE, (store / "m-3").as_uri()):
        client.create_model_version("shop", source=source, tags={"solar.run_key": "k"})
    client.set_registered_model_alias("shop", "champion", "1")
    return str(tmp_path / "workspace")


def complaint(model, workspace, **tracking):
    with pytest.raises(UserError) as error:
        fetch_model(model, tracking=TrackingConfig(**tracking), workspace=workspace)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_alias_and_version_lead_to_the_same_files_and_the_rest_is_told_in_one_line(workspace, tmp_path, monkeypatch):
    by_alias = fetch_model("models:/shop@champion", tracking=TrackingConfig(), workspace=workspace)
    by_version = fetch_model("models:/shop/1", tracking=TrackingConfig(), workspace=workspace)
    assert (by_alias.name, by_alias.version, by_alias.alias, by_version.alias) == ("shop", "1", "champion", None)
    assert by_alias.directory == by_version.directory
    assert by_alias.tags == {"solar.run_key": "k"}
    assert by_alias.uri == "models:/shop/1"
    assert by_alias.settings["max_history"] == by_alias.scorer().settings["max_history"]
    assert "has no alias 'best'; its aliases: champion" in complaint("models:/shop@best", workspace)
    assert "has no version 9; its versions: 1, 2, 3" in complaint("models:/shop/9", workspace)
    assert "no model 'other' at sqlite" in complaint("models:/other/1", workspace)
    assert "must have the form models:/NAME@ALIAS or models:/NAME/VERSION" in complaint("shop", workspace)
    assert "table-genre.safetensors is missing" in complaint("models:/shop/3", workspace)
    assert "no MLflow store there" in complaint("models:/shop/1", str(tmp_path / "elsewhere"))
    damaged = Path(workspace) / "mlflow" / "m-3" / "artifacts" / "model" / "scorer.json"
    damaged.write_text(damaged.read_text()[:100])
    assert f"models:/shop/3: {damaged} is not valid JSON" in complaint("models:/shop/3", workspace)
    damaged.write_text('{"features": 3}')
    assert f"models:/shop/3: {damaged} has no key 'model'" in complaint("models:/shop/3", workspace)

    fetched = []

    def download(*, artifact_uri, dst_path, **_):
        fetched.append(artifact_uri)
        if len(fetched) == 1:
            raise OSError("s3://me:secret@host: no route")
        return shutil.copytree(by_alias.directory, Path(dst_path) / "model")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    line = complaint("models:/shop/2", workspace)
    assert "cannot be fetched: s3://me:***@host: no route" in line
    assert list((Path(workspace) / "models" / "shop").iterdir()) == []
    remote = fetch_model("models:/shop/2", tracking=TrackingConfig(), workspace=workspace)
    again = fetch_model("models:/shop/2", tracking=TrackingConfig(), workspace=workspace)
    assert fetched == [f"{REMOTE}/artifacts/model"] * 2
    assert remote.directory == again.directory
    assert remote.digest == by_alias.digest


def test_a_store_that_does_not_answer_is_named_without_its_password(tmp_path):
    line = complaint("models:/shop/1", str(tmp_path), uri="postgresql://me:secret@nowhere/db")
    assert "MLflow at postgresql://me:***@nowhere/db does not answer" in line
    assert "secret" not in line
