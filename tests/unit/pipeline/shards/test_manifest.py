import json
import multiprocessing

import pytest

from pipeline.events import DataError, flatten
from pipeline.shards.manifest import Manifest, commit, current_manifest, read_manifest


def manifest(number=1, **change):
    fields = {
        "number": number, "schema": {"columns": ["timestamp"]}, "config": {}, "counts": {}, "users": 1, "items": 1,
        "time_range": [0, 1], "files": [], "vocabulary": {}, "index": {}, "inputs": [], "parent": None,
    }  # fmt: skip
    return Manifest(**fields | change)


def test_the_largest_number_is_the_current_data_set(tmp_path):
    assert current_manifest(str(tmp_path)) is None
    for number in (1, 2):
        commit(str(tmp_path), manifest(number))
    (tmp_path / "manifests/notes.json").write_text("x")
    assert current_manifest(str(tmp_path)) == manifest(2)
    assert read_manifest(str(tmp_path), number=1) == manifest(1)
    with pytest.raises(DataError, match=r"no manifests/00000007.json; there are \[1, 2\]"):
        read_manifest(str(tmp_path), number=7)


def _race(arguments):
    path, users = arguments
    try:
        commit(path, manifest(1, users=users))
    except DataError as error:
        return str(error)
    return ""


def test_of_racing_commits_one_wins_and_the_others_are_told(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        answers = pool.map(_race, [(str(tmp_path), users) for users in range(6)])
    won = [users for users, answer in enumerate(answers) if not answer]
    assert len(won) == 1
    assert current_manifest(str(tmp_path)) == manifest(1, users=won[0])
    assert all("committed manifest 1 first" in answer for answer in answers if answer)


def test_a_damaged_or_foreign_manifest_is_refused_by_name(tmp_path):
    commit(str(tmp_path), manifest())
    path = tmp_path / "manifests/00000001.json"
    for text, words in (
        ("{", "is damaged"),
        (json.dumps({"format_version": 9}), "format version 9, this program reads 2; prepare into"),
        (json.dumps({"format_version": 1}), "format version 1, this program reads 2; prepare into a new directory"),
        (json.dumps({"format_version": 2, "colour": 2}), "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=f"manifests/00000001.json.*{words}"):
            current_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["../elsewhere/part.parquet", "/etc/passwd", "shards/../../part.parquet", ""])
def test_names_outside_of_the_directory_are_refused(tmp_path, name):
    commit(str(tmp_path), manifest(vocabulary={"name": name}))
    with pytest.raises(DataError, match="outside its directory"):
        current_manifest(str(tmp_path))


def test_the_fingerprint_follows_the_content():
    assert manifest().fingerprint == manifest().fingerprint != manifest(users=2).fingerprint


def test_keys_are_written_as_a_user_writes_them():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}
