"""REPORT placeholder to be replaced."""

from __future__ import annotations

import json


def write_report(config, root, journal, outcome):
    path = journal.directory / "report.html"
    path.write_text("<pre>" + json.dumps(outcome, indent=1) + "</pre>")
    return path
