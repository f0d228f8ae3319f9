"""RecBole's atomic files: ratings become labels, and columns of other names are mapped."""

import polars as pl
import pytest

from pipeline.events import DataError, EventColumns
from pipeline.sources.published import import_published
from pipeline.sources.recbole import RecBoleConfig

STEAM = "user_id:token\tproduct_id:token\tplay_hours:float\ttimestamp:float\nu\tp\t1.0\t1500000000\n"
SESSIONS = "session_id:token\titem_id:token\ttimestamp:float\tnumber of times:float\n1\t81766\t1462752000\t1.0\n"
PLAYS = "user_id:token\tartist_id:token\tweight:float\n2\t51\t13883\n2\t52\t7\n"
STARS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\ta\t5\t10\n1\tb\t3.5\t11\n1\tc\t1\t12\n"


@pytest.fixture
def load(tmp_path):
    """Import the text as an .inter file; the events."""

    def run(text, config=RecBoleConfig(), **tables):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for ending, content in ({"inter": text} | tables).items():
            (folder / f"set.{ending}").write_text(content)
        out = tmp_path / f"log-{len(list(tmp_path.iterdir()))}"
        import_published("recbole", str(folder), str(out), atomic=config)
        return pl.read_parquet(out / "events-00000.parquet")

    return run


def test_ratings_become_labels_at_a_threshold(load):
    assert load(STARS)["label"].to_list() == [1, 0, 0]
    assert load(STARS, RecBoleConfig(min_label=3.5))["label"].to_list() == [1, 1, 0]
    stars = STARS.replace("rating", "stars")
    assert "label" not in load(stars).columns
    assert load(stars, RecBoleConfig(rating="stars"))["label"].to_list() == [1, 0, 0]
    with pytest.raises(
        DataError, match=r"set/set.inter: no column 'points' \(rating\); it has 'user_id', 'item_id', 'stars'"
    ):
        load(stars, RecBoleConfig(rating="points"))


def test_a_label_is_taken_before_a_rating(load):
    text = "user_id:token\titem_id:token\trating:float\tlabel:float\ttimestamp:float\n1\ta\t5\t0\t10\n1\tb\t1\t1\t11\n"
    assert load(text)["label"].to_list() == [0, 1]


@pytest.mark.parametrize(
    ("text", "columns", "options"),
    [
        (STEAM, {"item_id": "product_id"}, "--columns.item_id product_id"),
        (SESSIONS, {"user_id": "session_id"}, "--columns.user_id session_id"),
        (
            SESSIONS.replace("item_id", "sku").replace("timestamp", "event_time"),
            {"user_id": "session_id", "item_id": "sku", "timestamp": "event_time"},
            "--columns.user_id session_id --columns.item_id sku --columns.timestamp event_time",
        ),
        (
            PLAYS,
            {"item_id": "artist_id", "timestamp": None, "order": "weight"},
            "--columns.item_id artist_id --columns.timestamp COLUMN (without times: --columns.timestamp null, and "
            "--columns.order COLUMN for integers that order events)",
        ),
    ],
)
def test_columns_of_other_names_are_named_by_the_options_that_map_them(load, text, columns, options):
    with pytest.raises(DataError, match=r"set/set.inter: no column") as error:
        load(text)
    assert str(error.value).endswith(f"name the right ones with {options}")
    found = load(text, RecBoleConfig(columns=EventColumns(**columns)))
    assert found["item_id"].to_list() == [row.split("\t")[1] for row in text.splitlines()[1:]]


def test_tables_have_their_ids_under_the_name_that_events_use(load, tmp_path):
    config = RecBoleConfig(columns=EventColumns(item_id="product_id"))
    load(STEAM, config, item="product_id:token\tgenre:token_seq\np\tRPG Indie\n")
    (table,) = tmp_path.glob("log-*/items.parquet")
    assert pl.read_parquet(table).rows() == [("p", ["RPG", "Indie"])]
    with pytest.raises(
        DataError, match=r"set/set.item: no column 'product_id', as the events have it; it has 'id', 'genre'"
    ):
        load(STEAM, config, item="id:token\tgenre:token_seq\np\tRPG Indie\n")
