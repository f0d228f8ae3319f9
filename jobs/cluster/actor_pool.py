"""Processes descriptors of work in a pool of Ray Data actors; each actor opens its model and data once.

The data itself is in files: a descriptor says what to read, an answer what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.cluster.worker_group import make_room_for_tasks
from jobs.host.errors import UserError
from pipeline.build import quiet_ray_data
from pipeline.events import DataError, NotNow
from pipeline.system_errors import as_data_error

Work = Callable[[dict[str, Any]], dict[str, Any]]
MOST_BLOCKS = 2_000
"""Largest number of blocks of descriptors: more blocks cost the driver time without a gain."""


def map_in_actors(
    opened: Callable[[], Work], rows: Sequence[dict[str, Any]], *, parallel: int | None
) -> Iterator[dict[str, Any]]:
    """The answers to all rows, in the order in which they become ready. `opened()` is called once in each of `parallel`
    actors (None = one per core of the cluster) and returns the function that answers a row. Ray must be initialised.

    A UserError or DataError in an actor is raised here with the same type and message, and what the system refused as
    a DataError.
    """
    import ray
    import ray.data

    make_room_for_tasks()
    actors = min(parallel or max(1, int(ray.cluster_resources().get("CPU", 1))), len(rows))
    if not actors:
        return
    with quiet_ray_data():
        encoded: list[Any] = [{"row": json.dumps(row)} for row in rows]
        descriptors = ray.data.from_items(encoded, override_num_blocks=min(len(rows), MOST_BLOCKS))
        pool = ray.data.ActorPoolStrategy(size=actors)
        actor: Any = _Actor
        answers = descriptors.map(actor, fn_constructor_args=(opened,), compute=pool)
        for answer in answers.iter_rows():
            if answer["kind"]:
                raise _KINDS[answer["kind"]](answer["answer"])
            yield json.loads(answer["answer"])


class _Actor:
    def __init__(self, opened: Callable[[], Work]) -> None:
        self._opened, self._work = opened, None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            # Not in the constructor: after an error there Ray would restart the actor repeatedly and hide the reason.
            self._work = self._work or self._opened()
            return {"answer": json.dumps(self._work(json.loads(row["row"]))), "kind": ""}
        except Exception as error:
            told = error if isinstance(error, UserError | DataError) else as_data_error(error)
            if told is None:
                raise
            return {"answer": str(told), "kind": next(name for name, kind in _KINDS.items() if isinstance(told, kind))}


_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "NotNow": NotNow, "DataError": DataError}
