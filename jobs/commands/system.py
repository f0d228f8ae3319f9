"""doctor: does everything work on this machine?"""

from __future__ import annotations

from jobs.commands.arguments import usage_error
from jobs.host.console import Console


def doctor(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.doctor import doctor

    unknown = [argument for argument in arguments if argument not in ("--json", "-h", "--help")]
    if unknown:
        raise usage_error("doctor", f"unknown argument {unknown[0]}: it takes --json only")
    if set(arguments) & {"-h", "--help"}:
        console.line("solar doctor [--json]: one line a check, ok or the fix; exit code 1 if something is broken")
        return 0
    return doctor(console, as_json="--json" in arguments)
