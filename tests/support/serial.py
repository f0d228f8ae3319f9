"""Prepare without Ray: its tasks run in this process, one after the other."""

import json

from pipeline import build


def without_ray(set_attribute):
    """Replace what starts tasks; their arguments and results still pass through JSON, as with Ray."""

    def serially(function, rows, *, stage, report, at_once=None, tasks=1):
        return [json.loads(json.dumps(function(json.loads(json.dumps(row))))) for row in rows]

    set_attribute(build, "_map", serially)
    set_attribute(build, "_require_ray", lambda: None)
