"""What an export holds while it reads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from jobs.config.reader import load_config
from jobs.runs import export as exporting
from pipeline.shards.leases import current_leases


def test_gc_keeps_the_state_that_an_export_reads(data, tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(1)}, tmp_path / "dense.safetensors")
    held = []
    monkeypatch.setattr(exporting, "training_shards", lambda *_: data)
    monkeypatch.setattr(exporting, "write_export", lambda *_, **__: held.extend(current_leases(data.path)))
    config = load_config("register", "movielens-100k", [])
    exporting.export_model(config, tmp_path, tmp_path / "export", tell=pytest.fail)
    assert [(each.command, each.manifest) for each in held] == [(f"export of {tmp_path}", 1)]
    assert current_leases(data.path) == []
