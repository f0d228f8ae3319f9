"""import, prepare, inspect: the commands that handle data."""

from __future__ import annotations

from pathlib import Path

from jobs.commands.arguments import capture, instantiate, parse, usage_error
from jobs.console import Console


def import_(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.config import SourceConfig
    from jobs.ingest import import_events
    from pipeline.sources.files import ImportConfig

    names = ("movielens-100k", "files")
    if not arguments or arguments[0] not in (*names, "-h", "--help"):
        raise usage_error(f"import {arguments[0] if arguments else ''}".strip(), f"name a source: {', '.join(names)}")
    name = arguments[0] if arguments[0] in names else "files"
    parser = ArgumentParser(prog=f"solar import {name}", exit_on_error=False)
    if name == "files":
        parser.add_argument("path", type=str, help="file, directory or pattern of CSV, JSON lines or Parquet")
        parser.add_argument("--items_path", type=str | None, default=None, help="table of items and their features")
        parser.add_class_arguments(ImportConfig)
    else:
        parser.add_argument("--from", type=str | None, default=None, help="a local copy of the wheel or of its files")
    parser.add_argument("--out", type=str | None, default=None, help="event log; default: WORKSPACE/events/NAME")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of everything written")
    parsed = parse(parser, arguments[1:] if arguments[0] in names else arguments)
    if parsed.out is None and name == "files":
        raise usage_error("import files", "--out DIR is not given: name the event log to write")
    out = parsed.out or str(Path(parsed.workspace) / "events" / name)
    capture(console, parsed.workspace, "import", verbose=verbose)
    if name == "files":
        fields = ImportConfig.__dataclass_fields__
        built = instantiate(parser, parsed)
        options = ImportConfig(**{field: built[field] for field in fields})
        source = SourceConfig(name=name, path=parsed.path, items_path=parsed.items_path, files=options)
    else:
        source = SourceConfig(name=name, path=parsed["from"])
    import_events(source, out, console, downloads=Path(parsed.workspace) / "downloads")
    return 0


def prepare(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.cluster import ClusterConfig
    from jobs.ingest import prepare_shards
    from pipeline.build import PrepareConfig

    parser = ArgumentParser(prog="solar prepare", exit_on_error=False)
    parser.add_argument("--events", type=str, required=True, help="event log: file, directory, pattern or s3:// URI")
    parser.add_argument("--out", type=str, required=True, help="directory of the sequence shards")
    parser.add_argument("--items_path", type=str | None, default=None, help="items table; default: the log's own")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of logs")
    parser.add_class_arguments(PrepareConfig)
    parser.add_class_arguments(ClusterConfig, "cluster")
    parsed = parse(parser, arguments)
    built = instantiate(parser, parsed)
    options = PrepareConfig(**{field: built[field] for field in PrepareConfig.__dataclass_fields__})
    capture(console, parsed.workspace, "prepare", verbose=verbose)
    prepare_shards(
        parsed.events, parsed.out, options, console, items=parsed.items_path, cluster=built["cluster"], verbose=verbose
    )
    return 0


def inspect(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.ingest import inspect

    parser = ArgumentParser(prog="solar inspect", exit_on_error=False)
    parser.add_argument("directory", type=str, help="sequence shards or a checkpoint")
    parser.add_argument("--verify", action="store_true", help="re-check every size and checksum")
    parser.add_argument("--digest", action="store_true", help="print the logical digest of the shards")
    parsed = parse(parser, arguments)
    return inspect(Path(parsed.directory), console, check=parsed.verify, with_digest=parsed.digest)
