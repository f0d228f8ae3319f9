"""A data set's rows as rows of a model that was trained on another vocabulary."""

from jobs.serving.model_rows import ModelRows
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards


def test_rows_of_another_vocabulary_are_found_by_id_and_name(data, export, prepare, write_log, random_log, tmp_path):
    scorer = export(data).scorer()
    log = random_log(num_items=60, seed=5).filter(random_log(num_items=60, seed=5)["item_id"] > 110)
    write_log(log.with_columns(action=log["action"].replace({"click": "buy"})), "other/events.parquet")
    prepare(tmp_path / "other", tmp_path / "others", columns=EventColumns(action="action"), buckets=1)
    vocabulary = Shards.open(str(tmp_path / "others")).vocabulary
    rows = ModelRows(scorer, vocabulary)
    raw = vocabulary.items.to_pylist()
    known = {item: row for row, item in enumerate(scorer.item_ids.to_pylist(), start=2)}
    assert rows.item.tolist() == [0, 1, *(known.get(item, 1) for item in raw)]
    assert any(item not in known for item in raw)
    assert vocabulary.actions == ("", "buy", "view")
    assert rows.action.tolist() == [0, 0, 2]
