"""import, prepare, inspect, compact, forget, gc, migrate: the commands that handle data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.arguments import capture, instantiate, parse, usage_error
from jobs.host.console import Console, one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from jobs.config.run import SourceConfig


def import_(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.config.run import SOURCES
    from jobs.data.prepare import import_events

    readers = {"movielens-100k": _movielens, "files": _files, "git": _git, "synthetic": _synthetic}
    if not arguments or arguments[0] not in (*SOURCES, "-h", "--help"):
        raise usage_error(f"import {arguments[0] if arguments else ''}".strip(), f"name a source: {', '.join(SOURCES)}")
    name = arguments[0] if arguments[0] in SOURCES else "files"
    parser = ArgumentParser(prog=f"solar import {name}", exit_on_error=False)
    read_source = readers[name](parser) if name in readers else _published(parser, name)
    parser.add_argument("--out", type=str | None, default=None, help="event log; default: WORKSPACE/events/NAME")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of everything written")
    parsed = parse(parser, arguments[1:] if arguments[0] in SOURCES else arguments)
    if parsed.out is None and name not in ("movielens-100k", "synthetic"):
        raise usage_error(f"import {name}", "--out DIR is not given: name the event log to write")
    out = parsed.out or str(Path(parsed.workspace) / "events" / name)
    source = read_source(parsed)
    capture(console, parsed.workspace, "import", verbose=verbose)
    import_events(source, out, console, downloads=Path(parsed.workspace) / "downloads")
    return 0


def _movielens(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    """Add the source's arguments; what is returned makes the source of the parsed ones. So do those below."""
    from jobs.config.run import SourceConfig

    parser.add_argument("--from", type=str | None, default=None, help="a local copy of the wheel or of its files")
    return lambda parsed: SourceConfig(name="movielens-100k", path=parsed["from"])


def _files(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run import SourceConfig
    from pipeline.sources.files import ImportConfig

    parser.add_argument("path", type=str, help="file, directory or pattern of CSV, JSON lines or Parquet")
    parser.add_argument("--items_path", type=str | None, default=None, help="table of items and their features")
    parser.add_argument("--users_path", type=str | None, default=None, help="table of users and their features")
    parser.add_class_arguments(ImportConfig)
    return lambda parsed: SourceConfig(
        name="files",
        path=parsed.path,
        items_path=parsed.items_path,
        users_path=parsed.users_path,
        files=_build(ImportConfig, parser, parsed),
    )


def _git(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run import SourceConfig
    from pipeline.sources.git import GitConfig

    parser.add_argument("path", type=str, nargs="+", help="repositories: worktrees or bare ones")
    parser.add_class_arguments(GitConfig)
    return lambda parsed: SourceConfig(name="git", path=tuple(parsed.path), git=_build(GitConfig, parser, parsed))


def _synthetic(parser: ArgumentParser) -> Callable[[Any], SourceConfig]:
    from jobs.config.run import SourceConfig
    from pipeline.sources.synthetic_world import SyntheticConfig

    parser.add_class_arguments(SyntheticConfig)
    return lambda parsed: SourceConfig(name="synthetic", synthetic=_build(SyntheticConfig, parser, parsed))


def _published(parser: ArgumentParser, name: str) -> Callable[[Any], SourceConfig]:
    from jobs.config.run import SourceConfig

    parser.add_argument("path", type=str, help="the unpacked data set, or its file of events")
    return lambda parsed: SourceConfig(name=name, path=parsed.path)


def _build(options: type, parser: ArgumentParser, parsed: Any) -> Any:
    """The options that stand at the top of a command; their own rules are checked here, sections' in instantiate."""
    built = instantiate(parser, parsed)
    try:
        return options(**{field: built[field] for field in options.__dataclass_fields__})
    except ValueError as error:
        raise usage_error(parser.prog.removeprefix("solar "), one_line(error)) from error


def prepare(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.cluster.session import ClusterConfig
    from jobs.data.prepare import prepare_shards
    from pipeline.build import PrepareConfig

    parser = ArgumentParser(prog="solar prepare", exit_on_error=False)
    parser.add_argument("--events", type=str, required=True, help="event log: file, directory, pattern or s3:// URI")
    parser.add_argument("--out", type=str, required=True, help="directory of the sequence shards")
    parser.add_argument("--items_path", type=str | None, default=None, help="items table; default: the log's own")
    parser.add_argument("--users_path", type=str | None, default=None, help="users table; default: the log's own")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of logs")
    parser.add_class_arguments(PrepareConfig)
    parser.add_class_arguments(ClusterConfig, "cluster")
    parsed = parse(parser, arguments)
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


def inspect(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.data.inspect import inspect

    parser = ArgumentParser(prog="solar inspect", exit_on_error=False)
    parser.add_argument("directory", type=str, help="sequence shards or a checkpoint")
    parser.add_argument("--verify", action="store_true", help="re-check every size and checksum")
    parser.add_argument("--digest", action="store_true", help="print the logical digest of the shards")
    parsed = parse(parser, arguments)
    return inspect(Path(parsed.directory), console, check=parsed.verify, with_digest=parsed.digest)


def compact(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.data.maintenance import compact_shards

    return _on_shards("compact", compact_shards, arguments, console, verbose=verbose)


def migrate(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.data.maintenance import migrate_shards

    return _on_shards("migrate", migrate_shards, arguments, console, verbose=verbose)


def forget(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.data.maintenance import check_forgotten, forget_users

    parser = _shards_parser("forget")
    parser.add_argument("--users", type=str, required=True, help="text with an id a line, or Parquet with user_id")
    parser.add_argument("--outputs", type=str, nargs="+", default=[], help="results of solar score to clean as well")
    parser.add_argument("--verify", action="store_true", help="change nothing; look for what is left of the users")
    parsed = parse(parser, arguments)
    cluster = instantiate(parser, parsed)["cluster"]
    if parsed.verify:
        return check_forgotten(parsed.directory, parsed.users, console, outputs=parsed.outputs)
    capture(console, parsed.workspace, "forget", verbose=verbose)
    forget_users(
        parsed.directory, parsed.users, console, outputs=parsed.outputs, cluster=cluster, verbose=verbose
    )  # fmt: skip
    return 0


def gc(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.data.maintenance import collect_garbage

    parser = ArgumentParser(prog="solar gc", exit_on_error=False)
    parser.add_argument("directory", type=str, help="sequence shards")
    parser.add_argument("--keep", type=int, required=True, help="how many of the latest manifests stay readable")
    parsed = parse(parser, arguments)
    if parsed.keep < 1:
        raise usage_error("gc", f"--keep is {parsed.keep}: it must be at least 1")
    collect_garbage(parsed.directory, console, keep=parsed.keep)
    return 0


def _on_shards(
    command: str, work: Callable[..., None], arguments: list[str], console: Console, *, verbose: bool
) -> int:
    parser = _shards_parser(command)
    parsed = parse(parser, arguments)
    cluster = instantiate(parser, parsed)["cluster"]
    capture(console, parsed.workspace, command, verbose=verbose)
    work(parsed.directory, console, cluster=cluster, verbose=verbose)
    return 0


def _shards_parser(command: str) -> ArgumentParser:
    """Of a command that works on shards with Ray."""
    from jsonargparse import ArgumentParser

    from jobs.cluster.session import ClusterConfig

    parser = ArgumentParser(prog=f"solar {command}", exit_on_error=False)
    parser.add_argument("directory", type=str, help="sequence shards")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of logs")
    parser.add_class_arguments(ClusterConfig, "cluster")
    return parser
