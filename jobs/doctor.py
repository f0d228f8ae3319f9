"""solar doctor: checks that everything that Solar needs works on this machine. One line per check: ok, or the fix.

Each check runs in its own process (`python -m jobs.doctor NAME`), so that a library that crashes while it loads does
not end the other checks.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from jobs.host.console import Console

TIMEOUT_SECONDS = 180
NEEDED_DISK_GIB = 5
NEEDED_MEMORY_GIB = 4


def doctor(console: Console, *, as_json: bool = False) -> int:
    """Run every check; returns 1 if one failed, else 0."""
    results = []
    for name, (_, fix) in CHECKS.items():
        ok, text = _run(name)
        results.append({"check": name, "ok": ok, "detail": text, "fix": "" if ok else fix})
        if not as_json:
            console.line(f"{'ok ' if ok else 'NO '} {name:<12} {text}" + ("" if ok else f"\n    fix: {fix}"))
    if as_json:
        console.line(json.dumps(results, indent=1))
    return 0 if all(result["ok"] for result in results) else 1


def _run(name: str) -> tuple[bool, str]:
    """(whether the check succeeded, its result or last line of errors)."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.doctor", name], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIMEOUT_SECONDS} s"
    marked = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == 0 and marked:
        return True, marked[-1]
    errors = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return False, errors[-1].strip() if errors else f"exit code {done.returncode}"


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise RuntimeError(f"Python {sys.version.split()[0]} is not 3.11 or 3.12")
    return f"{sys.version.split()[0]} at {sys.executable}"


def _versions() -> str:
    """Compare the installed versions with the pins of pyproject.toml, if that file is there."""
    pins = _pins()
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in pins if _is_installed(name)}
    wrong = [f"{name} {version}, pinned {pins[name]}" for name, version in installed.items() if version != pins[name]]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    builds = [name for name in ("fbgemm-gpu-cpu", "fbgemm-gpu") if _is_installed(name)]
    if len(builds) != 1:
        raise RuntimeError(f"exactly one build of fbgemm must be installed, found {builds or 'none'}")
    shown = ("torch", "torchrec", builds[0], "deepspeed", "ray", "mlflow")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)


def _pins() -> dict[str, str]:
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if not file.exists():
        return {}
    document = tomllib.loads(file.read_text())
    lists = [document["project"]["dependencies"], *document["project"]["optional-dependencies"].values()]
    lists += [entry for entry in document["dependency-groups"].values()]
    pins = [requirement.split("==") for requirements in lists for requirement in requirements if "==" in requirement]
    return {name.split("[")[0]: version for name, version in pins}


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _fbgemm() -> str:
    import fbgemm_gpu
    import torch

    lengths = torch.tensor([2, 0, 1])
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    if offsets.tolist() != [0, 2, 2, 3]:
        raise RuntimeError(f"cumulative sum of [2, 0, 1] is {offsets.tolist()}")
    return f"{fbgemm_gpu.__version__}, operators load"


def _torchrec() -> str:
    import torch

    from models.embeddings import ItemFeature, TableSpec, embedding_collection, look_up_ids, pool_features

    feature = ItemFeature(name="genres", offsets=torch.tensor([0, 0, 0, 2, 2]), values=torch.tensor([2, 3]))
    specs = [TableSpec(name=name, capacity=4, width=8) for name in ("item", "genres")]
    tables = embedding_collection(specs, device="cpu")
    item_IC, features_IFC = pool_features(tables(look_up_ids(torch.tensor([2, 3]), [feature])), [feature])
    if item_IC.shape != (2, 8) or not features_IFC[0].any() or features_IFC[1].any():
        raise RuntimeError("a look-up of two items returned wrong rows")
    return "one look-up of two items and their features"


def _gloo() -> str:
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as directory:
        spawn(_all_reduce, args=(f"file://{directory}/store",), nprocs=2)
    return "all-reduce between two processes"


def _all_reduce(rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    if value.item() != 3:
        raise RuntimeError(f"1 + 2 = {value.item()}")
    dist.destroy_process_group()


def _deepspeed() -> str:
    from jobs.cluster.worker import quiet_libraries

    quiet_libraries()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator is None:
        raise RuntimeError("DeepSpeed finds no accelerator, not even the CPU")
    return f"{deepspeed.__version__}, accelerator {accelerator.device_name()}"


def _ray() -> str:
    import ray

    from jobs.cluster.session import ClusterConfig, ray_session

    with ray_session(ClusterConfig()):
        resources = ray.cluster_resources()
    how = "joined the cluster of RAY_ADDRESS" if os.environ.get("RAY_ADDRESS", "local") != "local" else "local start"
    return f"{how}, {resources.get('CPU', 0):.0f} CPUs, {resources['memory'] / 2**30:.1f} GiB for tasks"


def _mlflow() -> str:
    from jobs.tracking.mlflow_runs import TrackingConfig, mlflow_client, open_run, tracking_uri

    with tempfile.TemporaryDirectory() as workspace:
        run = open_run(TrackingConfig(), workspace, name="doctor")
        run.metrics({"value": 1.0}, step=0)
        run.close()
        stored = mlflow_client(tracking_uri(TrackingConfig(), workspace)).get_run(run.run_id)
    if stored.data.metrics != {"value": 1.0}:
        raise RuntimeError(f"wrote value 1.0, read {stored.data.metrics}")
    return "SQLite store written and read"


def _disk() -> str:
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_DISK_GIB:
        raise RuntimeError(f"{free:.1f} GiB free here, {NEEDED_DISK_GIB} needed")
    return f"{free:.0f} GiB free here"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    if memory.available / 2**30 < NEEDED_MEMORY_GIB:
        raise RuntimeError(f"{memory.available / 2**30:.1f} GiB available, {NEEDED_MEMORY_GIB} needed")
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available, {os.cpu_count()} CPUs"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none (not needed: parallel.device=cpu)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)}: {', '.join(names)}"


CHECKS: dict[str, tuple[Callable[[], str], str]] = {
    "python": (_python, "install Python 3.11 or 3.12 and run `make setup PYTHON=python3.11`"),
    "versions": (_versions, "remove .venv and run `make setup`"),
    "fbgemm": (_fbgemm, "install one build only: fbgemm-gpu-cpu on a CPU torch, fbgemm-gpu on a CUDA torch (README)"),
    "torchrec": (_torchrec, "remove .venv and run `make setup`"),
    "gloo": (_gloo, "allow connections of this machine to itself; set GLOO_SOCKET_IFNAME=lo"),
    "deepspeed": (_deepspeed, "remove .venv and run `make setup`; DS_ACCELERATOR=cpu forces the CPU"),
    "ray": (_ray, "`ray stop --force`; free memory and disk; keep TMPDIR short (a socket path has 107 bytes at most)"),
    "mlflow": (_mlflow, "check that the temporary directory is writable; remove .venv and run `make setup`"),
    "disk": (_disk, "free disk space, or use --workspace on a larger disk"),
    "memory": (_memory, "close other programs; `ray stop --force` ends leftover Ray processes"),
    "gpus": (_gpus, "check the driver with nvidia-smi"),
}


if __name__ == "__main__":
    from jobs.cluster.session import quiet_environment

    quiet_environment()
    print("RESULT", CHECKS[sys.argv[1]][0]())
