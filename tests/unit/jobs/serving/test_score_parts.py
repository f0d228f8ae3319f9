"""Requests of any size: parts scored by actors of Ray Data, joined to what one process gives."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cluster.session import ClusterConfig
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.serving import score as score_module
from jobs.serving.build_states import build_states
from jobs.serving.ranking import ScoreConfig
from jobs.serving.score import score
from pipeline.events import DataError
from tests.support.serial import command_without_ray

pytestmark = pytest.mark.usefixtures("local_ray")


def requests(num=23):
    rng = np.random.default_rng(2)
    return pa.table(
        {
            "place": range(num),
            "user_id": rng.integers(0, 24, num),
            "candidates": [rng.integers(95, 135, n).tolist() for n in rng.integers(0, 7, num)],
        }
    )


@pytest.fixture
def serially(monkeypatch):
    """with serially(): what actors of Ray would do is done in this process."""

    @contextmanager
    def replaced():
        with monkeypatch.context() as patch:
            command_without_ray(patch.setattr)
            yield

    return replaced


def scored(model, tmp_path, asked, name, **config):
    out = tmp_path / name
    counts = score(model, ScoreConfig(requests=str(asked), out=str(out), **config), Console(), parallel=2)
    return pq.read_table(out), counts, pq.read_metadata(out).metadata


def test_parts_are_joined_to_the_result_of_one_process(data, export, tmp_path, monkeypatch, serially):
    model, file = export(data), tmp_path / "requests.parquet"
    pq.write_table(requests(), file, row_group_size=8)
    with serially():
        whole, counts, footer = scored(model, tmp_path, file, "whole.parquet", shards=data.path)
    monkeypatch.setattr(score_module, "ROWS_PER_PART", 5)
    parts, same_counts, same_footer = scored(model, tmp_path, file, "parts.parquet", shards=data.path)
    assert (same_counts, same_footer) == (counts, footer)
    assert parts.schema == whole.schema
    assert parts["place"].to_pylist() == list(range(23))
    assert parts["candidates"].to_pylist() == whole["candidates"].to_pylist()
    scores = [np.concatenate(table["scores"].to_pylist()) for table in (parts, whole)]
    # Blocks of other sizes are summed in another order.
    assert np.abs(scores[0] - scores[1]).max() < 1e-4
    assert len(scores[0]) == counts.candidates > 50
    # The same rows in several files, in the order of their names.
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(requests()[:9], folder / "a.parquet")
    pq.write_table(requests()[9:9], folder / "b.parquet")
    pq.write_table(requests()[9:], folder / "c.parquet")
    (folder / "_SUCCESS").touch()
    with serially():
        joined, counts, _ = scored(model, tmp_path, folder, "joined.parquet", shards=data.path)
    assert joined.drop_columns("scores").equals(parts.drop_columns("scores"))
    assert counts == same_counts
    with serially():
        build_states(
            model, shards=data.path, manifest=None, out=tmp_path / "states", console=Console(), cluster=ClusterConfig()
        )
        stored, counts, _ = scored(model, tmp_path, folder, "stored.parquet", states=str(tmp_path / "states"))
    assert stored["candidates"].to_pylist() == whole["candidates"].to_pylist()
    assert counts.from_states == 23 - counts.without_state > 15
    assert sorted(path.name for path in tmp_path.iterdir() if "stag" in path.name) == []


def test_tasks_that_rank_the_whole_catalogue_are_short_and_give_the_ranking_of_one_process(
    data, export, tmp_path, monkeypatch, serially
):
    model, file, tasks = export(data), tmp_path / "requests.parquet", []
    pq.write_table(requests().drop_columns("candidates"), file)
    original = score_module.map_in_actors
    monkeypatch.setattr(
        score_module, "map_in_actors", lambda opened, rows, **more: tasks.extend(rows) or original(opened, rows, **more)
    )
    with serially():
        whole, counts, _ = scored(model, tmp_path, file, "whole.parquet", shards=data.path, top_k=3)
    num_items = pq.read_metadata(model.directory / "items.parquet").num_rows
    monkeypatch.setattr(score_module, "SCORES_PER_TASK", 5 * num_items + 1)
    with serially():
        parts, same_counts, _ = scored(model, tmp_path, file, "parts.parquet", shards=data.path, top_k=3)
    assert [task["num_rows"] for task in tasks] == [5, 5, 5, 5, 3]
    assert same_counts == counts
    assert parts["candidates"].to_pylist() == whole["candidates"].to_pylist()


def test_a_mistake_in_any_part_is_one_line_and_leaves_nothing(data, export, tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "ROWS_PER_PART", 5)
    model, file = export(data), tmp_path / "requests.parquet"
    asked = requests().to_pylist()
    asked[17]["candidates"] = None
    pq.write_table(pa.Table.from_pylist(asked), file)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        scored(model, tmp_path, file, "out.parquet", shards=data.path)
    assert str(error.value) == f"{file}: row 17: column 'candidates' is null: give a list, which may be empty"
    with pytest.raises(DataError, match="no prepared data set there"):
        scored(model, tmp_path, file, "out.parquet", shards=str(tmp_path / "nowhere"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_directories_that_are_no_requests_are_refused(data, export, tmp_path):
    model, folder = export(data), tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="no Parquet files there"):
        scored(model, tmp_path, folder, "out.parquet")
    pq.write_table(requests()[:0], folder / "a.parquet")
    with pytest.raises(UserError, match="has no requests"):
        scored(model, tmp_path, folder, "out.parquet")
    pq.write_table(requests().drop_columns("place"), folder / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: its columns differ from those of .*a\.parquet"):
        scored(model, tmp_path, folder, "out.parquet")
    (folder / "b.parquet").unlink()
    pq.write_table(requests(), folder / "a.parquet")
    for name in ("part-0", "b.parquet.gz", "sub/c.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "a.parquet").read_bytes())
    (folder / "sub/d.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"folder: 4 files are not read: folder/b\.parquet\.gz \(not \*\.parquet\), "):
        scored(model, tmp_path, folder, "out.parquet")
    shutil.rmtree(folder / "sub")
    (folder / "part-0").unlink()
    (folder / "b.parquet.gz").unlink()
    for out in ("folder/out.parquet", "folder/sub/out.parquet"):
        with pytest.raises(UserError, match="is in the directory of the requests"):
            scored(model, tmp_path, folder, out, shards=data.path)


def test_a_directory_of_requests_is_read_with_all_that_lies_below_it(data, export, tmp_path, serially):
    model, folder, asked = export(data), tmp_path / "asked", requests(9)
    for place, name in enumerate(("B.PARQUET", "day=1/a.parquet", "day=2/a.parquet")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(asked.slice(3 * place, 3), folder / name)
    (folder / "_SUCCESS").touch()
    with serially():
        found, counts, _ = scored(model, tmp_path, folder, "out.parquet", shards=data.path)
    assert (found["place"].to_pylist(), counts.requests) == (list(range(9)), 9)


def test_a_column_that_is_there_twice_is_named(data, export, tmp_path):
    users = pa.array(["u1"])
    pq.write_table(pa.table([users, users], names=["user_id", "user_id"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet: column 'user_id' is there twice: keep one of them$"):
        scored(export(data), tmp_path, tmp_path / "twice.parquet", "out.parquet", shards=data.path)
