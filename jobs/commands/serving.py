"""score: the command that uses registered models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.commands.arguments import capture, parse, usage_error
from jobs.host.console import Console, one_line


def score(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.cluster.session import ClusterConfig
    from jobs.serving.build_states import build_states
    from jobs.serving.ranking import ScoreConfig
    from jobs.serving.score import print_counts
    from jobs.serving.score import score as score_requests
    from jobs.serving.stored_states import states_directory
    from jobs.tracking.registry import fetch_model
    from jobs.tracking.runs import TrackingConfig

    parser = ArgumentParser(prog="solar score", exit_on_error=False)
    parser.add_argument("model", type=str, help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--requests", type=str | None, default=None, help="Parquet: a row a request")
    parser.add_argument("--out", type=str | None, default=None, help="Parquet file of the result; directory of states")
    parser.add_argument("--shards", type=str | None, default=None, help="sequence shards with the users' histories")
    parser.add_argument("--states", type=str | None, default=None, help="the users' stored states: DIR, or auto")
    parser.add_argument(
        "--build-states", action="store_true", help="store what serving needs of every user of --shards"
    )
    parser.add_argument("--manifest", type=int | None, default=None, help="of the shards, for --build-states")
    parser.add_argument("--top_k", type=int | None, default=None, help="keep the best so many candidates")
    parser.add_argument("--keep_seen", action="store_true", help="whole catalogue: rank what the history holds too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of the MLflow store and of logs")
    parser.add_argument("--tracking.uri", type=str | None, default=None, help="MLflow; default: the workspace's store")
    parser.add_argument("--parallel", type=int | None, default=None, help="actors; default: a core each")
    parser.add_argument(
        "--cluster.address", type=str | None, default=None, help="Ray; default: RAY_ADDRESS, else local"
    )
    parsed = parse(parser, arguments)
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


def _refuse_mixed_up(parsed: Any) -> None:
    """UserError for options of scoring beside those of building states, and the other way round."""
    if parsed.parallel is not None and parsed.parallel < 1:
        raise usage_error("score", f"--parallel={parsed.parallel}: must be 1 or more")
    if parsed.build_states:
        if parsed.shards is None:
            raise usage_error("score", "--build-states: needs --shards DIR, the users whose states are built")
        for option in ("requests", "states", "top_k"):
            if parsed[option] is not None:
                raise usage_error("score", f"--{option}: belongs to scoring requests, not to --build-states")
        return
    for option in ("requests", "out"):
        if parsed[option] is None:
            raise usage_error("score", f"--{option} is missing: give a Parquet file")
    if parsed.manifest is not None:
        raise usage_error("score", "--manifest: belongs to --build-states")
