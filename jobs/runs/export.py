"""The best checkpoint of a run -> the files of a registered version: weights, vocabulary, settings, scorer.py."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.config.run_config import RunConfig
from jobs.runs.record import record_of
from jobs.scorer.checksums import CHECKSUMS, COUNTERS, write_checksums
from jobs.scorer.request_frame import REQUEST_COLUMNS
from jobs.tracking.registry import EXPORT
from jobs.training.catalogue import evidence_counts, training_counts
from jobs.training.checkpoint import table_files
from jobs.training.item_counting import count_items
from jobs.training.model import model_settings, user_features
from models.embeddings import ITEM_TABLE, USER_TABLE
from models.zoo import MODELS, tower_class
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary

SCORER_FILES = (
    *("checksums.py", "histories.py", "request_frame.py", "packed_states.py", "user_states.py", "request_columns.py"),
    "scorer.py",
)
"""Files of jobs/scorer, in the order in which they are concatenated."""
RUNTIME_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "safetensors", "torch")
REPOSITORY = Path(__file__).resolve().parents[2]


def export_model(config: RunConfig, checkpoint: Path, directory: Path, *, tell: Callable[[str], None]) -> None:
    """Write the export of a checkpoint, as `write_export` does. `tell` gets the line of a lease that is refused."""
    dense, shards = load_file(checkpoint / "dense.safetensors"), training_shards(config, checkpoint)
    with lease(shards.path, number=shards.manifest.number, command=f"export of {checkpoint}", tell=tell):
        write_export(
            directory,
            shards=shards,
            config=config.as_dict(),
            model=config.model,
            requests=config.data.requests,
            table=lambda name: _whole_table(checkpoint, name),
            tower={key: value for key, value in dense.items() if "/" not in key},
        )


def write_export(
    directory: Path,
    *,
    shards: Shards,
    config: dict[str, Any],
    model: dict[str, Any],
    requests: RequestConfig,
    table: Callable[[str], Tensor],
    tower: dict[str, Tensor],
) -> None:
    """Write the files that the scorer reads: tables without optimizer state, tower, items with their feature rows,
    values of user features, settings, checksums.

    `table(NAME)` returns a table's weights, with at least as many rows as its vocabulary; `tower` is the state dict.
    """
    # Tables, cut to the size of their vocabularies, and tower.
    directory.mkdir(parents=True)
    vocabulary = shards.vocabulary
    known = user_features(model, vocabulary)
    sizes = {ITEM_TABLE: vocabulary.size, **{name: feature.size for name, feature in vocabulary.features.items()}}
    sizes |= {f"{USER_TABLE}{name}": len(vocabulary.user_features[name]) + NUM_RESERVED for name in known}
    for name, size in sizes.items():
        save_file({"weight": table(name)[:size].clone()}, directory / f"table-{name}.safetensors")
    save_file(tower, directory / "model.safetensors")
    # Vocabularies, and how often each item occurs in training.
    pq.write_table(_items_table(vocabulary), directory / "items.parquet")
    if known:
        values = [(name, value) for name in known for value in vocabulary.user_features[name]]
        listed = {"feature": [name for name, _ in values], "value": [value for _, value in values]}
        pq.write_table(pa.table(listed), directory / "user-values.parquet")
    counts = training_counts(shards, requests=requests)[: vocabulary.size]
    stored = {"training_events": torch.tensor(counts)}
    if model.get("prior"):
        evidence = evidence_counts(shards, requests=requests, training_count=counts)[: vocabulary.size]
        stored["evidence_events"] = torch.tensor(evidence)
        counters = count_items(shards, min_label=requests.least_label, evidence=evidence)
        save_file(counters.tensors(), directory / COUNTERS)
    save_file(stored, directory / "item-counts.safetensors")
    # Settings, and the checksums of all files. An export that has checksums is complete.
    settings = {
        "model": model_settings(model, vocabulary),
        "features": list(vocabulary.features),
        "user_features": known,
        "actions": list(vocabulary.actions),
        "first_item_row": NUM_RESERVED,
        "max_history": requests.max_history,
        "min_label": requests.least_label,
        "task": requests.task,
        "unknown_last": True,
        "log_columns": shards.manifest.schema["columns"],
        "time_range": shards.manifest.time_range,
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "checksums": CHECKSUMS,
    }
    (directory / "scorer.json").write_text(json.dumps(settings, indent=1, sort_keys=True))
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    write_checksums(directory)


def log_export(directory: Path, *, model: dict[str, Any], vocabulary: Vocabulary) -> Any:
    """Log an export (in a directory named `model`) and its scorer as an MLflow model of the active run; returns
    MLflow's ModelInfo."""
    import mlflow

    assert directory.name == EXPORT, directory
    with tempfile.TemporaryDirectory() as scratch:
        scorer = Path(scratch) / "scorer.py"
        scorer.write_text(scorer_source(model["name"]))
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(scorer),
            artifacts={EXPORT: str(directory)},
            signature=signature(model, vocabulary),
            pip_requirements=[f"{package}=={_version(package)}" for package in RUNTIME_PACKAGES],
        )


def scorer_source(model: str) -> str:
    """The source of scorer.py: the files of jobs/scorer and every file of models/ that the tower needs, in one file."""
    config_class, tower = MODELS[model][0], tower_class(model)
    needed = (REPOSITORY / f"{tower.__module__.replace('.', '/')}.py", REPOSITORY / "models" / "prior.py")
    parts = [_module_body(path) for path in _imported_files(*needed)]
    *others, scorer = [_module_body(REPOSITORY / "jobs" / "scorer" / name) for name in SCORER_FILES]
    lines = scorer.splitlines()
    start = next(index for index, line in enumerate(lines) if "# scorer: replaced at export" in line)
    lines[start : start + 3] = [
        f'    config = {config_class.__name__}(**{{key: settings[key] for key in settings if key != "name"}})',
        f"    return {tower.__name__}(config, num_features=num_features)",
    ]
    body = "\n\n".join(["from __future__ import annotations", *parts, *others, "\n".join(lines)])
    return f"{body}\n\nimport mlflow  # noqa: E402\n\nmlflow.models.set_model(Scorer())\n"


def _imported_files(*paths: Path) -> list[Path]:
    """Every file of models/ that `paths` import, directly or indirectly, and they; each after its own imports."""
    ordered: list[Path] = []

    def visit(file: Path) -> None:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("models."):
                visit(REPOSITORY / f"{str(node.module).replace('.', '/')}.py")
        if file not in ordered:
            ordered.append(file)

    for path in paths:
        visit(path)
    return ordered


def _module_body(path: Path) -> str:
    """The source of a file without its imports from `__future__` and from this repository."""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (
            node.module == "__future__" or (node.module or "").startswith(("models.", "jobs."))
        ):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def _whole_table(checkpoint: Path, table: str) -> Any:
    parts = []
    for file in table_files(checkpoint, table):
        with safe_open(file, framework="pt") as tensors:
            parts.append(tensors.get_tensor("weight"))
    return torch.cat(parts)


def _items_table(vocabulary: Vocabulary) -> pa.Table:
    """item_id, and a list of value rows for each feature; in the order of the item table's rows from NUM_RESERVED."""
    import numpy as np

    columns: dict[str, Any] = {"item_id": vocabulary.raw(np.arange(NUM_RESERVED, vocabulary.size))}
    for name, feature in vocabulary.features.items():
        offsets = feature.offsets[NUM_RESERVED:] - feature.offsets[NUM_RESERVED]
        values = feature.values[feature.offsets[NUM_RESERVED] :]
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.int64()))
    return pa.table(columns)


def signature(model: dict[str, Any], vocabulary: Vocabulary) -> Any:
    """The columns that MLflow passes to the scorer, which checks them itself (jobs/scorer/scorer.py documents them).

    All are of AnyType: for other types MLflow would damage values (in a list of strings with a null it keeps only the
    first letter of each string) or refuse them in its own words, with the whole input, and a record that lacks an
    optional column with them.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    # Not required: the scorer's own message about a missing column is clearer than MLflow's.
    names = ("candidates", *REQUEST_COLUMNS, *user_features(model, vocabulary))
    inputs = Schema([ColSpec(AnyType(), name, required=False) for name in dict.fromkeys(names)])
    return ModelSignature(inputs=inputs, outputs=Schema([ColSpec(Array(DataType.double), "scores")]))


def training_shards(config: RunConfig, checkpoint: Path) -> Shards:
    """The data set as it was when the checkpoint was trained."""
    return Shards.open(config.shards_dir, number=record_of(checkpoint).manifest)


def _version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]
