"""The manifest of a CronJob whose pod submits the night to a permanent Ray cluster and follows its log."""

from __future__ import annotations

from typing import Any

from jobs.cluster.job_client import choose_address
from jobs.host.errors import INTERRUPTED, MISTAKE, TRY_LATER, UserError
from jobs.scheduling.kubernetes import (
    DEADLINE_SECONDS,
    TOKEN_KEY,
    TOKEN_SECRET,
    Night,
    TargetConfig,
    container,
    metadata,
    pod,
    recipe_volume,
    shared_documents,
    token_environment,
)

MISSED_SECONDS = 6 * 3600
"""A missed start is made up for within this time; after that, the next night includes the missed days."""
KEPT_SECONDS = 3 * 24 * 3600
"""Finished jobs are removed after this time."""
POD_RETRIES = 3
"""New pods after a lost pod; jobs that fail are tried again by `solar submit`, which waits longer in between."""
FINAL = [MISTAKE, TRY_LATER, INTERRUPTED]
"""Exit codes after which another pod does not help: a mistake, all tries used up, a job that was stopped by a user."""
NAME = "submit"
COMMENT = f"""\
Runs each night as a job of a permanent Ray cluster. `solar submit` waits in the pod, tries again after a temporary
failure (missing input, no answer from MLflow) and ends with the job's exit code; it does not try again after a user's
mistake (exit code 2). Needs Kubernetes 1.27 or later. All nodes of the Ray cluster must see the workspace and every
path of the recipe.
Create first:   kubectl create secret generic {TOKEN_SECRET} --from-file={TOKEN_KEY}=$HOME/.ray/auth_token
One night now:  kubectl create job --from=cronjob/(name) (name)-now"""


def cronjob_documents(night: Night, target: TargetConfig) -> dict[str, list[Any]]:
    """{file name: [head comment, manifest, ...]}."""
    if target.head is None:
        raise UserError("schedule: --emit cronjob: name the permanent Ray cluster: --head http://HOST:8265")
    head = choose_address(target.head, {})
    comment = COMMENT.replace("(name)", night.name)
    return {**shared_documents(night, target), "cronjob.yaml": [comment, _cronjob(night, target, head)]}


def _cronjob(night: Night, target: TargetConfig, head: str) -> dict[str, Any]:
    volumes, mounts = recipe_volume(night)
    submit = container(
        NAME,
        target,
        command=["solar"],
        args=[
            "submit",
            *("--address", head),
            *("--retries", str(target.retries)),
            *("--retry-minutes", f"{target.retry_minutes:g}"),
            *("--tag", f"schedule={night.name}"),
            "--",
            *night.arguments,
        ],
        env=token_environment(),
        resources={"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
        **({"volumeMounts": mounts} if mounts else {}),
    )
    job = {
        "backoffLimit": POD_RETRIES,
        "activeDeadlineSeconds": DEADLINE_SECONDS,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "podFailurePolicy": {
            "rules": [
                # A pod evicted from a drained node does not count as a failure.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": NAME, "operator": "In", "values": FINAL}},
            ]
        },
        "template": {
            "metadata": {"labels": metadata(night, target)["labels"]},
            "spec": {**pod(night, [submit], volumes=volumes), "restartPolicy": "Never"},
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata(night, target),
        "spec": {
            "schedule": night.cron.portable,
            "timeZone": night.cron.time_zone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": MISSED_SECONDS,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 7,
            "jobTemplate": {"spec": job},
        },
    }
