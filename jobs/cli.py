"""The command `solar`: one subcommand a job.

A user's mistake ends with one line on stderr and exit code 2; an interruption leaves a resumable state and exits 130;
anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.console import Console
from jobs.recipes import recipe_names

USAGE = """\
solar COMMAND ... [-v]

  run RECIPE            import, prepare, train, evaluate, register in one go; reuses what is there
  doctor [--json]       does everything work on this machine?
  import SOURCE         a public format -> event log (movielens-100k, files)
  prepare               event log -> sequence shards; again with more events: merges
  inspect DIR           what is in a shard directory or a checkpoint (--verify, --digest)
  train RECIPE          shards -> checkpoints and an MLflow run (--resume)
  evaluate RECIPE       the run's best checkpoint -> metrics, beside its baselines
  register RECIPE       the run's best checkpoint -> MLflow registry

RECIPE is one of {recipes}, or a YAML file.
Further configuration follows it: --config FILE, dotted overrides (--model.rank 8), --print_config.
-v shows what the libraries print. `solar COMMAND --help` lists the options.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    from jobs.cluster import quiet_environment

    quiet_environment()
    verbose = any(flag in arguments for flag in ("-v", "--verbose"))
    arguments = [argument for argument in arguments if argument not in ("-v", "--verbose")]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"solar: unknown command {arguments[0]!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _guarded(COMMANDS[arguments[0]], arguments[1:], verbose=verbose)


def _guarded(command: Callable[..., int], arguments: list[str], *, verbose: bool) -> int:
    from jsonargparse import ArgumentError

    from jobs.config import ConfigError
    from jobs.training.checkpoint import CheckpointError
    from jobs.workers import Interrupted, WorkerFailure
    from pipeline.events import DataError

    console = Console()
    try:
        return command(arguments, console, verbose=verbose)
    except (ConfigError, DataError, CheckpointError, ArgumentError, ConnectionError) as error:
        console.error(f"solar: {_one_line(error)}")
        return 2
    except Interrupted:
        console.error(
            "solar: interrupted; the same command continues from the last checkpoint (`solar train` with --resume)"
        )
        return 130
    except KeyboardInterrupt:
        console.error("solar: interrupted; what was committed is still there")
        return 130
    except WorkerFailure as error:
        console.error(f"solar: a worker failed: {_one_line(error)}" + ("" if verbose else f" (details: {console.log})"))
        return 1
    except Exception:
        console.error(traceback.format_exc())
        return 1


def _run(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import run as run_all

    config = _config("run", arguments)
    if config is not None:
        _capture(console, config.workspace, "run", verbose=verbose)
        run_all(config, console, verbose=verbose)
    return 0


def _train(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.train import train

    resume = "--resume" in arguments
    config = _config("train", [argument for argument in arguments if argument != "--resume"])
    if config is None:
        return 0
    _capture(console, config.workspace, "train", verbose=verbose)
    trained = train(config, console, resume=resume, verbose=verbose)
    console.line(f"{'already there: ' if trained.reused else ''}{trained.checkpoint}")
    return 0


def _evaluate(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import evaluate_runs, print_results

    config = _config("evaluate", arguments)
    if config is not None:
        _capture(console, config.workspace, "evaluate", verbose=verbose)
        print_results(config, console, evaluate_runs(config, console, verbose=verbose)[1])
    return 0


def _register(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.register import register
    from jobs.run import evaluate_runs
    from jobs.train import require_finished

    config = _config("register", arguments)
    if config is not None:
        _capture(console, config.workspace, "register", verbose=verbose)
        require_finished(config.run_dir)
        trained, evaluated = evaluate_runs(config, console, verbose=verbose)
        registered = register(config, trained, evaluated, console)
        console.line(f"{'already there: ' if registered.reused else ''}{registered.uri} ({registered.alias})")
    return 0


def _import(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.config import SourceConfig
    from jobs.ingest import import_events
    from pipeline.sources.files import ImportConfig

    names = ("movielens-100k", "files")
    if not arguments or arguments[0] not in (*names, "-h", "--help"):
        raise _usage_error(f"import {arguments[0] if arguments else ''}".strip(), f"name a source: {', '.join(names)}")
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
    parsed = _parse(parser, arguments[1:] if arguments[0] in names else arguments)
    if parsed.out is None and name == "files":
        raise _usage_error("import files", "--out DIR is not given: name the event log to write")
    out = parsed.out or str(Path(parsed.workspace) / "events" / name)
    _capture(console, parsed.workspace, "import", verbose=verbose)
    if name == "files":
        fields = ImportConfig.__dataclass_fields__
        built = _instantiate(parser, parsed)
        options = ImportConfig(**{field: built[field] for field in fields})
        source = SourceConfig(name=name, path=parsed.path, items_path=parsed.items_path, files=options)
    else:
        source = SourceConfig(name=name, path=parsed["from"])
    import_events(source, out, console, downloads=Path(parsed.workspace) / "downloads")
    return 0


def _prepare(arguments: list[str], console: Console, *, verbose: bool) -> int:
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
    parsed = _parse(parser, arguments)
    built = _instantiate(parser, parsed)
    options = PrepareConfig(**{field: built[field] for field in PrepareConfig.__dataclass_fields__})
    _capture(console, parsed.workspace, "prepare", verbose=verbose)
    prepare_shards(
        parsed.events, parsed.out, options, console, items=parsed.items_path, cluster=built["cluster"], verbose=verbose
    )
    return 0


def _inspect(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.ingest import inspect

    parser = ArgumentParser(prog="solar inspect", exit_on_error=False)
    parser.add_argument("directory", type=str, help="sequence shards or a checkpoint")
    parser.add_argument("--verify", action="store_true", help="re-check every size and checksum")
    parser.add_argument("--digest", action="store_true", help="print the logical digest of the shards")
    parsed = _parse(parser, arguments)
    return inspect(Path(parsed.directory), console, check=parsed.verify, with_digest=parsed.digest)


def _doctor(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.doctor import doctor

    unknown = [argument for argument in arguments if argument not in ("--json", "-h", "--help")]
    if unknown:
        raise _usage_error("doctor", f"unknown argument {unknown[0]}: it takes --json only")
    if set(arguments) & {"-h", "--help"}:
        console.line("solar doctor [--json]: one line a check, ok or the fix; exit code 1 if something is broken")
        return 0
    return doctor(console, as_json="--json" in arguments)


COMMANDS: dict[str, Callable[..., int]] = {
    "run": _run,
    "doctor": _doctor,
    "import": _import,
    "prepare": _prepare,
    "inspect": _inspect,
    "train": _train,
    "evaluate": _evaluate,
    "register": _register,
}


def _config(command: str, arguments: list[str]) -> Any | None:
    """The config of a command that takes a recipe; None after --help or --print_config."""
    from jobs.config import config_parser, load_config

    if arguments and arguments[0] in ("-h", "--help"):
        config_parser(command, model="solar").print_help()
        return None
    if not arguments or arguments[0].startswith("-"):
        raise _usage_error(command, f"name a recipe first: {', '.join(recipe_names())}, or a YAML file")
    flags = [argument for argument in arguments[1:] if argument == "--print_config"]
    config = load_config(command, arguments[0], [argument for argument in arguments[1:] if argument not in flags])
    if flags:
        import yaml

        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
        return None
    return config


def _parse(parser: Any, arguments: list[str]) -> Any:
    from jsonargparse import ArgumentError

    from jobs.config import ConfigError, explain

    try:
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"{parser.prog.removeprefix('solar ')}: {explain(error, parser)}") from error


def _instantiate(parser: Any, parsed: Any) -> Any:
    from jobs.config import ConfigError

    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        raise ConfigError(f"{parser.prog.removeprefix('solar ')}: {_one_line(error)}") from error


def _usage_error(command: str, text: str) -> Exception:
    from jobs.config import ConfigError

    return ConfigError(f"{command}: {text}")


def _capture(console: Console, workspace: str, command: str, *, verbose: bool) -> None:
    from jobs.config import ConfigError

    if verbose:
        return
    log = Path(workspace) / "logs" / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        console.capture_libraries(log)
    except OSError as error:
        raise ConfigError(f"workspace={workspace}: {error.strerror}: name a directory that can be written") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _usage() -> str:
    return USAGE.format(recipes=", ".join(recipe_names()))


if __name__ == "__main__":
    main()
