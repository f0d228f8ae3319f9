"""import, prepare, inspect, compact, forget, gc: the commands that handle data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.commands.arguments import Parsers, capture, instantiate, parse, usage_error
from jobs.host.console import Console, one_line
from jobs.host.places import Place, new_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from jobs.config.run_config import SourceConfig


def import_(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.config.run_config import SOURCES
    from jobs.data.prepare import import_events

    if {"-h", "--help"} & set(arguments[:1]):
        console.line(f"solar import SOURCE ...: SOURCE is one of {', '.join(SOURCES)}\n`solar import SOURCE --help`")
        return 0
    if not arguments or arguments[0] not in SOURCES:
        raise usage_error(f"import {arguments[0] if arguments else ''}".strip(), f"name a source: {', '.join(SOURCES)}")
    name = arguments[0]
    parser, read_source = _import_parser(name)
    parsed = parse(parser, arguments[1:])
    if parsed.out is None and name not in ("movielens-100k", "synthetic"):
        raise usage_error(f"import {name}", "--out DIR is not given: name the event log to write")
    out = parsed.out or str(Path(parsed.workspace) / "events" / name)
    source = read_source(parsed)
    capture(console, parsed.workspace, "import", verbose=verbose)
    import_events(source, out, console, downloads=Path(parsed.workspace) / "downloads")
    return 0


def import_parsers(arguments: Sequence[str]) -> Parsers:
    """The parser of the source that the first argument names; empty if it names no source."""
    from jobs.config.run_config import SOURCES

    return [_import_parser(arguments[0])[0]] if arguments and arguments[0] in SOURCES else []


def _import_parser(source: str) -> tuple[ArgumentParser, Callable[[Any], SourceConfig]]:
    """(the parser of `solar import SOURCE`, the function from parsed arguments to the source's configuration)."""
    parser = new_parser(f"import {source}", description="A public format, or your own files -> event log.")
    readers = {"movielens-100k": _movielens, "files": _files, "git": _git, "synthetic": _synthetic, "recbole": _recbole}
    read_source = readers[source](parser) if source in readers else _published(parser, source)
    parser.add_argument("--out", type=Place | None, default=None, help="event log; default: WORKSPACE/events/SOURCE")
    parser.add_argument("--workspace", type=Place, default="workspace", help="directory for downloads and logs")
    return parser, read_source


def _movielens(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    """Add the source's arguments to the parser; returns the function from parsed arguments to the source's
    configuration. The functions below do the same for other sources."""
    from jobs.config.run_config import SourceConfig

    parser.add_argument("--from", type=Place | None, default=None, help="a local copy of the wheel or of its files")
    return lambda parsed: SourceConfig(name="movielens-100k", path=parsed["from"])


def _files(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run_config import SourceConfig
    from pipeline.sources.files import ImportConfig

    parser.add_argument("path", type=Place, help="file, directory or pattern of CSV, JSON lines or Parquet")
    parser.add_argument("--items_path", type=Place | None, default=None, help="table of items and their features")
    parser.add_argument("--users_path", type=Place | None, default=None, help="table of users and their features")
    parser.add_class_arguments(ImportConfig)
    return lambda parsed: SourceConfig(
        name="files",
        path=parsed.path,
        items_path=parsed.items_path,
        users_path=parsed.users_path,
        files=_build(ImportConfig, parser, parsed),
    )


def _git(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run_config import SourceConfig
    from pipeline.sources.git import GitConfig

    parser.add_argument("path", type=Place, nargs="+", help="repositories: worktrees or bare ones")
    parser.add_class_arguments(GitConfig)
    return lambda parsed: SourceConfig(name="git", path=tuple(parsed.path), git=_build(GitConfig, parser, parsed))


def _synthetic(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run_config import SourceConfig
    from pipeline.sources.synthetic_world import SyntheticConfig

    parser.add_class_arguments(SyntheticConfig)
    return lambda parsed: SourceConfig(name="synthetic", synthetic=_build(SyntheticConfig, parser, parsed))


def _recbole(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from pipeline.sources.recbole import RecBoleConfig

    read_source = _published(parser, "recbole")
    parser.add_class_arguments(RecBoleConfig)
    return lambda parsed: dataclasses.replace(read_source(parsed), recbole=_build(RecBoleConfig, parser, parsed))


def _published(parser: ArgumentParser, name: str) -> Callable[[Any], SourceConfig]:
    from jobs.config.run_config import SourceConfig
    from pipeline.sources.files import ImportConfig
    from pipeline.sources.published import REJECTED_RATIO

    parser.add_argument("path", type=Place, help="the unpacked data set, or its file of events")
    parser.add_argument(
        "--max_rejected_ratio",
        type=float,
        default=REJECTED_RATIO,
        help="largest share of invalid rows; above it nothing is written",
    )
    return lambda parsed: SourceConfig(
        name=name,
        path=parsed.path,
        files=_of_options(ImportConfig, parser, max_rejected_ratio=parsed.max_rejected_ratio),
    )


def _build(options: type, parser: ArgumentParser, parsed: Any) -> Any:
    """The dataclass `options` from the command's top-level options, whose rules are checked here (`instantiate` checks
    those of sections)."""
    built = instantiate(parser, parsed)
    return _of_options(options, parser, **{field: built[field] for field in options.__dataclass_fields__})


def _of_options(options: type, parser: ArgumentParser, **fields: Any) -> Any:
    try:
        return options(**fields)
    except ValueError as error:
        raise usage_error(parser.prog.removeprefix("solar "), one_line(error)) from error


def prepare(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parser = prepare_parser()
    parsed = parse(parser, arguments)

    from jobs.data.prepare import prepare_shards
    from pipeline.build import PrepareConfig

    built = instantiate(parser, parsed)
    options = _build(PrepareConfig, parser, parsed)
    capture(console, parsed.workspace, "prepare", verbose=verbose)
    prepare_shards(
        parsed.events,
        parsed.out,
        options,
        console,
        items=parsed.items_path,
        users=parsed.users_path,
        cluster=built["cluster"],
        verbose=verbose,
    )
    return 0


def prepare_parser() -> ArgumentParser:
    from jobs.cluster.session import ClusterConfig
    from pipeline.build import PrepareConfig

    parser = new_parser("prepare", description="Event log -> sequence shards; with existing shards: adds new files.")
    parser.add_argument("--events", type=Place, required=True, help="event log: file, directory, pattern or s3:// URI")
    parser.add_argument("--out", type=Place, required=True, help="directory of the sequence shards")
    parser.add_argument("--items_path", type=Place | None, default=None, help="items table; default: the log's own")
    parser.add_argument("--users_path", type=Place | None, default=None, help="users table; default: the log's own")
    parser.add_argument("--workspace", type=Place, default="workspace", help="directory for logs")
    parser.add_class_arguments(PrepareConfig)
    parser.add_class_arguments(ClusterConfig, "cluster")
    return parser


def inspect(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(inspect_parser(), arguments)

    from jobs.data.inspect import inspect

    return inspect(parsed.directory, console, check=parsed.verify, with_digest=parsed.digest)


def inspect_parser() -> ArgumentParser:
    parser = new_parser(
        "inspect", description="Shows the contents of sequence shards, of a checkpoint or of a run's latest one."
    )
    parser.add_argument("directory", type=Place, help="sequence shards, a checkpoint or a run")
    parser.add_argument("--verify", action="store_true", help="check the size and checksum of every file")
    parser.add_argument("--digest", action="store_true", help="print a digest of sequences, features and counts")
    return parser


def compact(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parser = compact_parser()
    parsed = parse(parser, arguments)

    from jobs.data.maintenance import compact_shards

    cluster = instantiate(parser, parsed)["cluster"]
    capture(console, parsed.workspace, "compact", verbose=verbose)
    compact_shards(parsed.directory, console, cluster=cluster, verbose=verbose)
    return 0


def compact_parser() -> ArgumentParser:
    return _shards_parser("compact", "Merge the files of all ingests into one file per bucket of users.")


def forget(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parser = forget_parser()
    parsed = parse(parser, arguments)

    from jobs.data.maintenance import check_forgotten, forget_users

    cluster = instantiate(parser, parsed)["cluster"]
    where: Any = {"column": parsed.users_column, "workspace": parsed.workspace, "outputs": parsed.outputs}
    if parsed.verify:
        return check_forgotten(parsed.directory, parsed.users, console, **where)
    capture(console, parsed.workspace, "forget", verbose=verbose)
    return forget_users(
        parsed.directory, parsed.users, console, **where, missing_ok=parsed.missing == "ok", cluster=cluster,
        verbose=verbose,
    )  # fmt: skip


def forget_parser() -> ArgumentParser:
    parser = _shards_parser("forget", "Remove users permanently from shards, stored states and results.")
    add = parser.add_argument
    add(
        "--users",
        type=Place,
        required=True,
        help="text file with one id per line, exactly as in the log: LF or CRLF ends a line, spaces belong to the id, "
        "empty lines are ignored; or a table by its name (.csv, .tsv, .json, .jsonl, .parquet) with a column of ids; "
        "also compressed",
    )
    add("--users_column", type=str | None, default=None, help="column of a table with the ids; default: user_id")
    add(
        "--missing",
        type=Literal["error", "ok"],
        default="error",
        help="error: exit code 3 if an id was never in the data set; ok: exit code 0. The others are removed either "
        "way, and later logs cannot bring any of them",
    )
    add("--outputs", type=Place, nargs="+", default=[], help="results of `solar score` to clean, too")
    add(
        "--verify",
        action="store_true",
        help="change nothing; search the shards, the workspace and --outputs for remains of the users (exit code 1)",
    )
    return parser


def gc(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(gc_parser(), arguments)

    from jobs.data.maintenance import collect_garbage

    if parsed.keep < 1:
        raise usage_error("gc", f"--keep is {parsed.keep}: it must be at least 1")
    collect_garbage(parsed.directory, console, keep=parsed.keep)
    return 0


def gc_parser() -> ArgumentParser:
    parser = new_parser("gc", description="Remove old manifests of a data set, and the files that only they name.")
    parser.add_argument("directory", type=Place, help="directory of sequence shards")
    parser.add_argument("--keep", type=int, required=True, help="number of latest manifests to keep, 1 or more")
    return parser


def _shards_parser(command: str, description: str) -> ArgumentParser:
    """The parser of a command that processes shards with Ray."""
    from jobs.cluster.session import ClusterConfig

    parser = new_parser(command, description=description)
    parser.add_argument("directory", type=Place, help="directory of sequence shards")
    parser.add_argument("--workspace", type=Place, default="workspace", help="directory for logs")
    parser.add_class_arguments(ClusterConfig, "cluster")
    return parser
