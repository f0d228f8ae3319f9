"""Prepare without Ray: its tasks run in this process, one after the other."""

import pickle

from pipeline import build


def without_ray(set_attribute):
    """Replace what starts tasks; their arguments and results are still pickled, as with Ray."""

    def serially(function, rows, *, stage, report, at_once=None, tasks=1):
        return [pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(row))))) for row in rows]

    set_attribute(build, "_map", serially)
    set_attribute(build, "_require_ray", lambda: None)
