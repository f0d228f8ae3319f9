"""score: the command that uses registered models."""

from __future__ import annotations

from jobs.commands.arguments import capture, parse, usage_error
from jobs.console import Console, one_line


def score(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.registry import fetch_model
    from jobs.score import ScoreConfig, print_counts
    from jobs.score import score as score_requests
    from jobs.tracking import TrackingConfig

    parser = ArgumentParser(prog="solar score", exit_on_error=False)
    parser.add_argument("model", type=str, help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--requests", type=str, required=True, help="Parquet file, one row a request")
    parser.add_argument("--out", type=str, required=True, help="Parquet file of the result")
    parser.add_argument("--shards", type=str | None, default=None, help="sequence shards with the users' histories")
    parser.add_argument("--top_k", type=int | None, default=None, help="keep the best so many candidates")
    parser.add_argument("--keep_seen", action="store_true", help="whole catalogue: rank what the history holds too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of the MLflow store and of logs")
    parser.add_argument("--tracking.uri", type=str | None, default=None, help="MLflow; default: the workspace's store")
    parsed = parse(parser, arguments)
    try:
        config = ScoreConfig(**{field: parsed[field] for field in ScoreConfig.__dataclass_fields__})
    except ValueError as error:
        raise usage_error("score", f"--{one_line(error)}") from error
    tracking = TrackingConfig(uri=parsed.tracking.uri)
    capture(console, parsed.workspace, "score", verbose=verbose)
    model = fetch_model(parsed.model, tracking=tracking, workspace=parsed.workspace)
    console.line(f"{'model':<12} {model.name} version {model.version}{f' ({model.alias})' if model.alias else ''}")
    print_counts(score_requests(model, config, console), console)
    return 0
