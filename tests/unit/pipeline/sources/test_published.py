"""Public data sets in the layout of their owners, a few lines of each."""

import gzip
import json

import polars as pl
import pytest

from pipeline.events import DataError
from pipeline.sources.published import PUBLISHED, import_published

LINES = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,1029,4.0,1260759179\n7,31,5,851868750\n",
    "movies.csv": 'movieId,title,genres\n31,"Minds, the (1995)",Drama\n1029,Dumbo (1941),Animation|Children\n',
    "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n",
    "movies.dat": "661::James and the Giant Peach (1996)::Animation|Children's\n1193::Misérables, Les::Drama\n",
    "users.dat": "1::F::1::10::48067\n",
    "u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n",
    "u.user": "186|39|F|executive|00000\n196|49|M|writer|55105\n",
    "log_standard_4_08_to_4_21_pure.csv": (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,tab\n"
        "0,3784,20220408,1600,1649404800123,1,0,1\n0,41,20220408,1600,1649404801000,0,0,1\n"
    ),
    "log_random_4_22_to_5_08_pure.csv": "user_id,video_id,time_ms,is_click,tab\n0,7,1650600000000,1,1\n",
    "video_features_basic_pure.csv": (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,music_type,tag\n"
        '3784,441,NORMAL,2020-07-08,ShortImport,1,4,"12,65"\n41,9,AD,2020-07-08,Kmovie,1,4,\n'
    ),
    "user_features_pure.csv": "user_id,user_active_degree,follow_user_num_range,register_days_range\n0,full,0,730+\n",
    "Toys.csv": "user_id,parent_asin,rating,timestamp\nAGKA,B006,3.0,1452647382000\nAGKA,B00T,4.0,1454675785000\n",
    "behaviors.tsv": (
        "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0\n"
        "2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0\n"
    ),
    "news.tsv": 'N55689\tsports\tfootball_nfl\t"Fortune" guest\ta\turl\t[]\t[]\nN2\tnews\tus\tt\ta\tu\t[]\t[]\n',
    "UserBehavior.csv": "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n",
    "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
    "ml.item": "item_id:token\ttitle:token_seq\tyear:token\tclass:token_seq\n242\tKolya\t1996\tComedy X\n",
    "ml.user": "user_id:token\tage:token\tgender:token\n196\t49\tM\n",
}


@pytest.fixture
def unpacked(tmp_path):
    """A directory that holds these files somewhere below."""

    def make(*names):
        folder = tmp_path / "download" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_bytes(LINES[name].encode("latin-1" if name.endswith(".dat") else "utf-8"))
        return str(tmp_path / "download")

    return make


def events(out):
    return pl.read_parquet(f"{out}/events-00000.parquet")


def test_movielens_ratings_are_labels_from_four_stars_on(unpacked, tmp_path):
    out = str(tmp_path / "log")
    imported = import_published("movielens", unpacked("ratings.csv", "movies.csv"), out)
    assert (imported.events, imported.items, imported.rejected) == (3, 2, 0)
    assert events(out)["label"].to_list() == [0, 1, 1]
    assert events(out)["timestamp"].dt.epoch("s").to_list() == [1260759144, 1260759179, 851868750]
    assert pl.read_parquet(f"{out}/items.parquet").rows() == [(31, ["Drama"]), (1029, ["Animation", "Children"])]


def test_movielens_of_the_older_layouts(unpacked, tmp_path):
    imported = import_published("movielens", unpacked("ratings.dat", "movies.dat", "users.dat"), str(tmp_path / "a"))
    assert (imported.events, imported.items, imported.users) == (2, 2, 1)
    assert pl.read_parquet(tmp_path / "a/users.parquet").rows() == [(1, "F", "1", "10")]
    imported = import_published("movielens", str(tmp_path / "download/data/ratings.dat"), str(tmp_path / "b"))
    assert (imported.items, imported.users) == (2, 1)


def test_movielens_100k_as_grouplens_has_it(unpacked, tmp_path):
    import_published("movielens", unpacked("u.data", "u.user"), str(tmp_path / "log"))
    assert events(tmp_path / "log")["label"].to_list() == [0, 1]
    assert pl.read_parquet(tmp_path / "log/users.parquet").rows() == [(186, "F", "executive"), (196, "M", "writer")]


def test_kuairand_takes_the_standard_log_with_milliseconds(unpacked, tmp_path):
    names = [name for name in LINES if name.endswith("_pure.csv")]
    imported = import_published("kuairand", unpacked(*names), str(tmp_path / "log"))
    log = events(tmp_path / "log")
    assert (imported.events, imported.items, imported.users) == (2, 2, 1)
    assert log["timestamp"].dt.epoch("ms").to_list() == [1649404800123, 1649404801000]
    assert (log["action"].to_list(), log["label"].to_list()) == (["1", "1"], [1, 0])
    assert pl.read_parquet(tmp_path / "log/items.parquet")["tag"].to_list()[0] == ["12", "65"]


def test_amazon_in_both_layouts(unpacked, tmp_path):
    import_published("amazon-2023", unpacked("Toys.csv"), str(tmp_path / "a"))
    review = {
        "user_id": "AGKA",
        "parent_asin": "B006",
        "asin": "B0",
        "rating": 5.0,
        "timestamp": 1452647382000,
        "text": "x",
    }
    with gzip.open(tmp_path / "Toys.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(review) + "\n")
    import_published("amazon-2023", str(tmp_path / "Toys.jsonl.gz"), str(tmp_path / "b"))
    assert events(tmp_path / "a")["label"].to_list() == [0, 1]
    assert events(tmp_path / "b").rows() == [("AGKA", "B006", events(tmp_path / "a")["timestamp"][0], 1)]


def test_mind_impressions_become_an_event_for_each_item_shown(unpacked, tmp_path):
    imported = import_published("mind", unpacked("behaviors.tsv", "news.tsv"), str(tmp_path / "log"))
    log = events(tmp_path / "log")
    assert imported.events == 3
    assert log.select("user_id", "item_id", "label").rows() == [
        ("U13740", "N55689", 1), ("U13740", "N35729", 0), ("U91836", "N20678", 0)
    ]  # fmt: skip
    assert log["timestamp"].dt.hour().to_list() == [9, 9, 18]
    assert log["request_id"].n_unique() == 2
    assert pl.read_parquet(tmp_path / "log/items.parquet").rows()[0] == ("N55689", "sports", "football_nfl")


def test_taobao_and_its_kinds_of_behaviour(unpacked, tmp_path):
    import_published("taobao", unpacked("UserBehavior.csv"), str(tmp_path / "log"))
    assert events(tmp_path / "log")["action"].to_list() == ["pv", "buy"]
    assert events(tmp_path / "log")["item_id"].to_list() == [2268318, 2333346]


def test_yambda_and_its_kinds_of_events(tmp_path):
    (tmp_path / "flat/50m").mkdir(parents=True)
    table = {
        "uid": [10, 10],
        "timestamp": [15, 40],
        "item_id": [7, 9],
        "is_organic": [1, 0],
        "event_type": ["listen", "like"],
    }
    pl.DataFrame(table).write_parquet(tmp_path / "flat/50m/multi_event.parquet")
    import_published("yambda", str(tmp_path / "flat/50m"), str(tmp_path / "log"))
    assert events(tmp_path / "log")["action"].to_list() == ["listen", "like"]


def test_recbole_files_say_what_their_columns_are(unpacked, tmp_path):
    imported = import_published("recbole", unpacked("ml.inter", "ml.item", "ml.user"), str(tmp_path / "log"))
    assert (imported.events, imported.items, imported.users) == (1, 1, 1)
    assert events(tmp_path / "log")["label"].to_list() == [0]
    items = pl.read_parquet(tmp_path / "log/items.parquet").to_dicts()
    assert items == [{"item_id": "242", "year": "1996", "title": ["Kolya"], "class": ["Comedy", "X"]}]
    assert pl.read_parquet(tmp_path / "log/users.parquet").columns == ["user_id", "age", "gender"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_download_that_is_not_there_or_wrong_is_named_with_what_was_expected(name, tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no .* there; unpack {name} as published: https://"):
        import_published(name, str(tmp_path), str(tmp_path / "log"))


def test_a_damaged_download_is_named_by_file_and_column(unpacked, tmp_path):
    folder = unpacked("ratings.csv", "movies.csv")
    file = tmp_path / "download/data/ratings.csv"
    file.write_text(LINES["ratings.csv"].replace("userId", "user"))
    with pytest.raises(
        DataError, match=r"ratings.csv: no column 'userId' \(mapped to user_id\); it has 'user', 'movieId'"
    ):
        import_published("movielens", folder, str(tmp_path / "log"))
    file.write_text(LINES["ratings.csv"].replace(",2.5,", ",good,").replace("4.0", ""))
    with pytest.raises(DataError, match=r"2 of 3 rows are invalid \(missing label: 1, invalid label: 1\)"):
        import_published("movielens", folder, str(tmp_path / "log"))
    assert not (tmp_path / "log").exists()
