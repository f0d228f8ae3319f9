"""Manifests with a separate Ray cluster for each night: RayJob for one night by hand, RayCronJob for all nights."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from jobs.cluster.session import OBJECT_STORE_BYTES
from jobs.cluster.submission import entrypoint
from jobs.host.notify import URL_VARIABLE
from jobs.scheduling.kubernetes import (
    CREDENTIALS,
    CREDENTIALS_SECRET,
    DEADLINE_SECONDS,
    TOKEN_KEY,
    TOKEN_SECRET,
    Night,
    TargetConfig,
    container,
    metadata,
    node_environment,
    pod,
    recipe_volume,
    shared_documents,
)

LOGS_SECONDS = 600
"""How long a cluster stays after its night, so that its logs can be read."""
SUBMITTER_RETRIES = 3
"""New submitter pods after a lost one; the night itself continues."""
GPU_CPUS = 4
"""Least number of CPUs per GPU: they read and build batches."""
HEAD = {"cpu": "2", "memory": "8Gi"}
WORKER_MEMORY = "16Gi"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
NEEDED = f"""\
Needs KubeRay 1.6 or later. Create first:
  kubectl create secret generic {TOKEN_SECRET} --from-literal={TOKEN_KEY}="$(openssl rand -hex 32)"
  kubectl create secret generic {CREDENTIALS_SECRET} --from-literal=... (optional; its keys become the environment:
    {", ".join(CREDENTIALS)},
    {URL_VARIABLE})
  a PersistentVolumeClaim (claim), ReadWriteMany
Memory and CPUs are first guesses: measure the first nights. `solar nightly` prevents two nights at the same time."""
JOB_COMMENT = f"""\
One night by hand, on a cluster that exists as long as the night. The manifest is suspended, so that applying the whole
directory starts nothing. Start it with:
  kubectl patch rayjob (name) --type merge --patch '{{"spec": {{"suspend": false}}}}'
K8sJobMode: a separate pod submits the job and shows the log. Unlike HTTPMode, the operator needs no connection to the
dashboard; unlike SidecarMode, the head does not end with the submitter.
{NEEDED}"""
CRON_COMMENT = f"""\
RayCronJob is ALPHA and behind a feature gate that is OFF by default. The operator must be 1.6 or later and run with
  --feature-gates=RayCronJob=true
Without this gate nothing in this file runs, and there is no error message: use `--emit cronjob` with a permanent Ray
cluster instead. RayCronJob has no policy for overlapping nights or for missed starts. A night ends if another one is
running, and each night includes all missing days. A failed night is tried again at once, on a new cluster. If input
may come late, choose more start times (such as 0 3-7 * * *): a night ends at once if its day is already done.
{NEEDED}"""


def kuberay_documents(night: Night, target: TargetConfig) -> dict[str, list[Any]]:
    """{file name: [head comment, manifest, ...]}."""
    job, cron = (
        comment.replace("(name)", night.name).replace("(claim)", target.claim)
        for comment in (JOB_COMMENT, CRON_COMMENT)
    )
    meta, spec = metadata(night, target), _job(night, target)
    schedule = {"schedule": night.cron.portable, "timeZone": night.cron.time_zone, "suspend": False}
    return {
        **shared_documents(night, target),
        "rayjob.yaml": [job, _document("RayJob", meta, {"suspend": True, **spec})],
        "raycronjob.yaml": [cron, _document("RayCronJob", meta, {**schedule, "jobTemplate": spec})],
    }


def _document(kind: str, meta: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": meta, "spec": spec}


def _job(night: Night, target: TargetConfig) -> dict[str, Any]:
    submitter = container(
        "ray-job-submitter",
        target,
        resources={"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
    )
    return {
        # KubeRay puts this into a shell line and Ray quotes its words again: quoted words arrive unchanged.
        "entrypoint": entrypoint("python", night.arguments),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
        "submitterPodTemplate": {"spec": {**pod(night, [submitter], volumes=[]), "restartPolicy": "Never"}},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": LOGS_SECONDS,
        "activeDeadlineSeconds": DEADLINE_SECONDS,
        "backoffLimit": target.retries,
        "metadata": {"schedule": night.name},
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
            "headGroupSpec": _head(night, target),
            "workerGroupSpecs": [_workers(night, target)],
        },
    }


def _head(night: Night, target: TargetConfig) -> dict[str, Any]:
    """The head's group: the driver runs here, and num-cpus 0 keeps tasks and workers on other nodes."""
    node = _node("ray-head", night, target, {"requests": HEAD, "limits": HEAD})
    node["containers"][0]["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    return {"rayStartParams": {"num-cpus": "0", **_START}, "template": {"spec": node}}


def _workers(night: Night, target: TargetConfig) -> dict[str, Any]:
    """The workers' group: one pod per training worker."""
    cpus = max(night.parallel.threads_per_worker, GPU_CPUS if target.gpu else 1)
    resources = {"cpu": str(cpus), "memory": WORKER_MEMORY} | ({"nvidia.com/gpu": "1"} if target.gpu else {})
    node = _node("ray-worker", night, target, {"requests": resources, "limits": resources})
    if target.gpu:
        node["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": "gpu" if target.gpu else "cpu",
        "replicas": night.parallel.max_workers,
        "minReplicas": night.parallel.min_workers,
        "maxReplicas": night.parallel.max_workers,
        "rayStartParams": dict(_START),
        "template": {"spec": node},
    }


_START = {"object-store-memory": str(OBJECT_STORE_BYTES)}


def _node(name: str, night: Night, target: TargetConfig, resources: dict[str, Any]) -> dict[str, Any]:
    """The spec of a cluster's pod, with volumes for the workspace, the recipe and the object store's shared memory."""
    volumes, mounts = recipe_volume(night)
    volumes = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": target.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{2 * OBJECT_STORE_BYTES >> 20}Mi"}},
        *volumes,
    ]
    mounts = [
        {"name": "workspace", "mountPath": night.workspace},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *mounts,
    ]
    ray = container(
        name,
        target,
        env=node_environment(),
        envFrom=[{"secretRef": {"name": CREDENTIALS_SECRET, "optional": True}}],
        resources=resources,
        volumeMounts=mounts,
    )
    return pod(night, [ray], volumes=volumes)
