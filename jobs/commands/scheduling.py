"""schedule: run `solar nightly` at the times of a cron expression, here or by manifests for Kubernetes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.commands.arguments import read_options, recipe_parser, usage_error, with_settings
from jobs.commands.nightly import nightly_parser
from jobs.host.console import Console
from jobs.host.places import Place


def schedule(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.config.reader import load_config
    from jobs.scheduling.cron import Cron
    from jobs.scheduling.foreground import run_nights

    if (found := read_options(schedule_parser(), arguments)) is None:
        return 0
    options, overrides = found
    recipe = str(options.recipe)  # a plain string: manifests are written as YAML
    _check(options, overrides)
    if options.emit and options.gpu:
        overrides += ["--parallel.device", "cuda"]
    config = load_config("nightly", recipe, overrides)
    try:
        cron = Cron(options.cron, options.time_zone or config.data.prepare.daily.time_zone)
    except ValueError as error:
        raise usage_error("schedule", f"--{error}") from error
    night = [recipe, *overrides, *(["-v"] if verbose else [])]
    if options.emit:
        return _emit(config, cron, night, options, console)
    return run_nights(config, cron, night, console, retries=options.retries, retry_minutes=options.retry_minutes)


def schedule_parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "schedule",
        usage='--cron "0 3 * * *" [options]',
        description="Runs `solar nightly RECIPE --catch-up` whenever the expression fires, until Ctrl-C or SIGTERM; "
        "with --emit writes Kubernetes manifests that do the same. Each night gets the settings given here.",
    )
    parser.add_argument(
        "--cron",
        metavar="EXPRESSION",
        help="required; five fields: minute, hour, day of month, month, weekday (0: Sunday), such as '0 3 * * *'",
    )
    parser.add_argument(
        "--time_zone",
        metavar="ZONE",
        help="time zone of --cron, an IANA name such as Europe/Berlin; default: data.prepare.daily.time_zone",
    )
    parser.add_argument(
        "--retries", type=int, help="number of further tries of a failed night, from 0 to 100; default: 5, kuberay: 2"
    )
    parser.add_argument(
        "--retry_minutes",
        type=float,
        help="minutes before the first further try, above 0 and at most 60; doubled before each later one; default: 5",
    )
    parser.add_argument("--emit", choices=("cronjob", "kuberay"), help="write manifests instead of running nights here")
    parser.add_argument("--out", type=Place, metavar="DIR", help="--emit: directory for the manifests")
    parser.add_argument("--image", help="--emit: container image, by tag (not latest) or digest")
    parser.add_argument("--gpu", action="store_true", help="--emit: each worker has one GPU")
    parser.add_argument("--namespace", help="--emit: Kubernetes namespace; default: default")
    parser.add_argument("--claim", help="--emit kuberay: PersistentVolumeClaim to mount; default: solar-workspace")
    parser.add_argument("--head", metavar="URL", help="--emit cronjob: dashboard of the Ray cluster, http://HOST:8265")
    parser.add_argument("--overwrite", action="store_true", help="--emit: replace manifests written there before")
    return parser


def _check(options: argparse.Namespace, overrides: list[str]) -> None:
    if not options.cron:
        raise usage_error("schedule", "--cron is not given: give for example --cron '0 3 * * *' for every day at 03:00")
    _check_emit(options)
    if options.retries is None:
        options.retries = 2 if options.emit == "kuberay" else 5
    if options.retry_minutes is None:
        options.retry_minutes = 5.0
    if not 0 <= options.retries <= 100:
        raise usage_error("schedule", f"--retries {options.retries}: must be from 0 to 100")
    if not 0 < options.retry_minutes <= 60:
        raise usage_error("schedule", f"--retry_minutes {options.retry_minutes:g}: must be above 0 and at most 60")
    if options.print_config:
        raise usage_error("schedule", "--print_config: is for `solar nightly`, which has the same settings")
    for flag in ("--date", "--catch-up", "--dry-run"):
        if any(argument.split("=")[0] == flag for argument in overrides):
            raise usage_error("schedule", f"{flag}: is for `solar nightly`: a scheduled night does all missing days")


def _check_emit(options: argparse.Namespace) -> None:
    """UserError for options that would have no effect."""
    for_emit = ("out", "image", "gpu", "namespace", "claim", "head", "overwrite")
    given = [name for name in for_emit if getattr(options, name)]
    if not options.emit and given:
        raise usage_error("schedule", f"--{given[0]}: is for manifests: give --emit cronjob or --emit kuberay")
    if options.emit and not (options.out and options.image):
        missing = "--image NAME:TAG" if options.out else "--out DIR"
        raise usage_error("schedule", f"--emit {options.emit}: {missing} is not given")
    if options.emit == "cronjob" and options.claim:
        raise usage_error("schedule", "--claim: is for --emit kuberay: a permanent cluster has its own workspace")
    if options.emit == "kuberay" and options.head:
        raise usage_error("schedule", "--head: is for --emit cronjob: KubeRay creates a cluster for each night")
    if options.emit == "kuberay" and options.retry_minutes is not None:
        raise usage_error("schedule", "--retry_minutes: KubeRay retries without a wait: omit it")


def _emit(config: Any, cron: Any, night: list[str], options: argparse.Namespace, console: Console) -> int:
    """Write the manifests."""
    from jobs.host.errors import UserError
    from jobs.scheduling.cronjob import cronjob_documents
    from jobs.scheduling.kuberay import kuberay_documents
    from jobs.scheduling.kubernetes import TargetConfig, night_of, write_manifests

    if config.parallel.device == "cuda" and not options.gpu:
        raise usage_error("schedule", "parallel.device=cuda: workers need GPUs: give --gpu")
    given = {name: getattr(options, name) for name in ("namespace", "claim", "head") if getattr(options, name)}
    try:
        target = TargetConfig(
            image=options.image, gpu=options.gpu, retries=options.retries, retry_minutes=options.retry_minutes, **given
        )
    except ValueError as error:
        raise UserError(f"schedule: {error}") from error
    parsers = with_settings(nightly_parser)(night)
    what = night_of(night[0], night[1:], config, cron, parsers=parsers)
    documents = (cronjob_documents if options.emit == "cronjob" else kuberay_documents)(what, target)
    for path in write_manifests(Path(options.out), documents, overwrite=options.overwrite):
        console.line(f"{path}")
    console.line(f"read the comments at the top of these files, then: kubectl apply -f {options.out}")
    return 0
