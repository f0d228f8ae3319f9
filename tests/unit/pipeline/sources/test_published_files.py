"""Downloads as they lie in a folder: several parts, other files beside them, two releases, links."""

import gzip
import json
import os

import polars as pl
import pytest

from pipeline.events import DataError
from pipeline.sources.published import import_published

TRAIN = "1\tU1\t11/11/2019 9:05:58 AM\tN3\tN1-1 N2-0\n"
DEV = "1\tU2\t11/15/2019 8:10:01 AM\tN3 N1\tN4-1 N3-0\n"
TEST = "1\tU3\t11/16/2019 8:10:01 AM\tN3 N1\tN4 N3\n"
REVIEW = {"user_id": "A", "parent_asin": "B", "rating": 5.0, "timestamp": 1452647382000}
RATINGS = "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n"


def news(*numbers):
    return "".join(f"N{number}\tkind-{number}\tsub\tt\ta\tu\t[]\t[]\n" for number in numbers)


@pytest.fixture
def download(tmp_path):
    """A folder `data` with these files and contents."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / "data")

    return make


def left_out(out):
    return json.loads((out / "source.json").read_text()).get("files_left_out", {})


def test_each_part_of_mind_brings_its_news_and_the_part_without_labels_is_left_out(download, tmp_path):
    mind = download(
        {
            "MINDlarge_train/behaviors.tsv": TRAIN, "MINDlarge_train/news.tsv": news(1, 2, 3),
            "MINDlarge_dev/behaviors.tsv": DEV, "MINDlarge_dev/news.tsv": news(3, 4),
            "MINDlarge_test/behaviors.tsv": TEST, "MINDlarge_test/news.tsv": news(4, 5),
            "MINDlarge_train/entity_embedding.vec": "x",
        }
    )  # fmt: skip
    imported = import_published("mind", mind, str(tmp_path / "log"))
    items = pl.read_parquet(tmp_path / "log/items.parquet")
    assert (imported.events, sorted(items["item_id"])) == (4, ["N1", "N2", "N3", "N4", "N5"])
    assert items.filter(pl.col("item_id") == "N4")["category"].to_list() == ["kind-4"]
    assert imported.left_out == {
        "file that mind does not need: data/MINDlarge_train/entity_embedding.vec": 1,
        "file without labels: data/MINDlarge_test/behaviors.tsv": 1,
    }
    with pytest.raises(DataError, match=r"no labels in MINDlarge_test/behaviors.tsv; name a part with labels"):
        import_published("mind", f"{mind}/MINDlarge_test", str(tmp_path / "test"))


def test_metadata_of_amazon_is_no_review(download, tmp_path):
    review = json.dumps(REVIEW)
    data = download({"meta_Toys.jsonl.gz": gzip.compress(b'{"parent_asin": "B"}\n'), "Toys.JSONL": review})
    imported = import_published("amazon-2023", data, str(tmp_path / "log"))
    assert (imported.events, imported.rejected) == (1, 0)
    assert left_out(tmp_path / "log") == {"data/meta_Toys.jsonl.gz": "that amazon-2023 does not need"}


def test_the_share_of_bad_rows_that_is_accepted_is_a_choice(download, tmp_path):
    before_1970 = json.dumps(REVIEW | {"timestamp": -5})
    data = download({"Toys.jsonl": f"{json.dumps(REVIEW)}\n{before_1970}\n"})
    with pytest.raises(DataError, match=r"1 of 2 rows are invalid \(invalid time: 1\), above max_rejected_ratio 0.05"):
        import_published("amazon-2023", data, str(tmp_path / "log"))
    assert import_published("amazon-2023", data, str(tmp_path / "log"), max_rejected_ratio=0.5).rejected == 1


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("movielens", {"ml-1m/ratings.dat": "1::2::3::4\n", "ml-100k/u.data": "1\t2\t3\t4\n"}),
        ("movielens", {"ml-25m/ratings.csv": RATINGS, "ml-latest/ratings.csv": RATINGS}),
        ("movielens", {"ratings.csv": RATINGS, "ratings.csv.gz": gzip.compress(RATINGS.encode())}),
        ("kuairand", {"log_standard_4_08_to_4_21_pure.csv": "", "log_standard_4_08_to_4_21_27k_part1.csv": ""}),
        ("mind", {"MINDsmall_dev/behaviors.tsv": DEV, "MINDlarge_train/behaviors.tsv": TRAIN}),
        ("amazon-2023", {"Toys.jsonl": json.dumps(REVIEW), "Toys.csv": "user_id,parent_asin,rating,timestamp\n"}),
        ("taobao", {"UserBehavior.csv": "1,2,3,pv,4\n", "UserBehavior.csv.zip": b"PK\x03\x04"}),
        ("yambda", {"50m/likes.parquet": b"", "500m/likes.parquet": b""}),
        ("recbole", {"steam.inter": "user_id:token\n", "yelp.inter": "user_id:token\n"}),
    ],
)
def test_two_releases_in_one_folder_are_refused_by_name(download, tmp_path, name, files):
    data = download(files)
    with pytest.raises(DataError, match=r"data: holds several releases, or one release twice \(") as error:
        import_published(name, data, str(tmp_path / "log"))
    assert all(file in str(error.value) for file in files)
    assert not (tmp_path / "log").exists()


def test_parts_of_one_release_are_read_together(download, tmp_path):
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    data = download({f"yelp.{part}.inter": f"{header}{part}\ti\t1\n" for part in ("train", "valid", "test")})
    assert import_published("recbole", data, str(tmp_path / "log")).events == 3
    small = import_published(
        "mind", download({"train/behaviors.tsv": TRAIN, "dev/behaviors.tsv": DEV}), str(tmp_path / "m")
    )
    assert small.events == 4


def test_what_lies_beside_a_single_file_is_not_searched_for_other_data_sets(download, tmp_path):
    data = download({"ratings.csv": RATINGS, "old/movies.csv": "movieId,title,genres\n31,x,Drama\n"})
    imported = import_published("movielens", f"{data}/ratings.csv", str(tmp_path / "log"))
    assert (imported.items, imported.left_out) == (0, {})


def test_linked_downloads_are_followed_and_what_cannot_be_read_is_named(download, tmp_path):
    data = download({"other/ml-32m/ratings.csv": RATINGS})
    os.mkdir(f"{data}/here")
    os.symlink("../other/ml-32m", f"{data}/here/ml-32m")
    assert import_published("movielens", f"{data}/here", str(tmp_path / "log")).events == 1
    os.mkfifo(f"{data}/here/movies.csv")
    with pytest.raises(DataError, match=r"here/movies.csv: a FIFO; name a regular file"):
        import_published("movielens", f"{data}/here", str(tmp_path / "again"))
