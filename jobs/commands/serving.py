"""score: the command that uses registered models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.arguments import capture, parse, usage_error
from jobs.host.console import Console, one_line
from jobs.host.places import Place, StatesPlace, new_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def score(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(score_parser(), arguments)

    from jobs.cluster.session import ClusterConfig
    from jobs.serving.build_states import build_states
    from jobs.serving.ranking import ScoreConfig
    from jobs.serving.score import print_counts
    from jobs.serving.score import score as score_requests
    from jobs.serving.stored_states import states_directory
    from jobs.tracking.mlflow_runs import TrackingConfig
    from jobs.tracking.registry import fetch_model

    _refuse_mixed_up(parsed)
    capture(console, parsed.workspace, "score", verbose=verbose)
    tracking, cluster = TrackingConfig(uri=parsed.tracking.uri), ClusterConfig(address=parsed.cluster.address)
    model = fetch_model(parsed.model, tracking=tracking, workspace=parsed.workspace)
    console.line(f"{'model':<12} {model.name} version {model.version}{f' ({model.alias})' if model.alias else ''}")
    own = states_directory(parsed.workspace, model)
    if parsed.build_states:
        out, parallel = Path(parsed.out or own), parsed.parallel
        build_states(
            model, shards=parsed.shards, manifest=parsed.manifest, out=out, console=console, cluster=cluster,
            parallel=parallel,
        )  # fmt: skip
        return 0
    states = str(own) if parsed.states == "auto" else parsed.states
    given: dict[str, Any] = {field: parsed[field] for field in ScoreConfig.__dataclass_fields__} | {"states": states}
    try:
        config = ScoreConfig(**given)
    except ValueError as error:
        raise usage_error("score", f"--{one_line(error)}") from error
    print_counts(score_requests(model, config, console, cluster=cluster, parallel=parsed.parallel), console)
    return 0


def score_parser() -> ArgumentParser:
    parser = new_parser(
        "score",
        description="Scores requests with a registered model -> ranked candidates with scores; with --build-states "
        "stores users' states for the model.",
    )
    add = parser.add_argument
    add("model", type=str, help="models:/NAME@ALIAS or models:/NAME/VERSION")
    add("--requests", type=Place | None, default=None, help="Parquet file, or directory of them: one row per request")
    add("--out", type=Place | None, default=None, help="Parquet file of the result; with --build-states a directory")
    add("--shards", type=Place | None, default=None, help="sequence shards with the users' histories")
    add(
        "--states",
        type=StatesPlace | None,
        default=None,
        help="directory of the users' stored states, or auto: WORKSPACE/states/NAME/VERSION",
    )
    add("--build-states", action="store_true", help="store a state of every user of --shards, for --states")
    add("--manifest", type=int | None, default=None, help="--build-states: number of a manifest; default: latest")
    add(
        "--top_k",
        type=int | None,
        default=None,
        help="number of best candidates to keep, 1 or more; default: all candidates of the request",
    )
    add("--keep_seen", action="store_true", help="rank items of the history, too, if the whole catalogue is ranked")
    add("--overwrite", action="store_true", help="replace an existing result")
    add("--workspace", type=Place, default="workspace", help="directory with the MLflow store, and for logs")
    add("--tracking.uri", type=Place | None, default=None, help="MLflow's tracking URI; default: the workspace's store")
    add(
        "--parallel",
        type=int | None,
        default=None,
        help="number of actors, each with the model in memory; default: one per core",
    )
    add("--cluster.address", type=str | None, default=None, help="Ray address; default: RAY_ADDRESS, else local")
    return parser


def _refuse_mixed_up(parsed: Any) -> None:
    """UserError if options for scoring and options for building states are mixed, or a required one is missing."""
    if parsed.parallel is not None and parsed.parallel < 1:
        raise usage_error("score", f"--parallel={parsed.parallel}: must be 1 or more")
    if parsed.build_states:
        if parsed.shards is None:
            raise usage_error("score", "--build-states: needs --shards DIR with the users whose states are built")
        for option in ("requests", "states", "top_k"):
            if parsed[option] is not None:
                raise usage_error("score", f"--{option}: is for scoring requests, not for --build-states")
        return
    for option in ("requests", "out"):
        if parsed[option] is None:
            raise usage_error("score", f"--{option} is missing: give a Parquet file")
    if parsed.manifest is not None:
        raise usage_error("score", "--manifest: is only for --build-states")
