"""One flipped bit of a registered model is refused with the file's name; a model without checksums still loads."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from jobs.host.errors import UserError
from jobs.scorer.checksums import CHECKSUMS, COUNTERS, export_digest, file_digests, write_checksums
from jobs.training.exported import load_export
from models.item_counters import MS_PER_DAY
from pipeline.events import DataError


def flipped(file, place: float) -> bytes:
    """The file's bytes with one bit flipped at this share of its length."""
    content = bytearray(file.read_bytes())
    content[min(len(content) - 1, int(place * len(content)))] ^= 4
    return bytes(content)


def test_one_flipped_bit_of_any_file_is_refused_in_one_line_that_names_it(data, export):
    model = export(data)
    files = sorted(model.directory.iterdir())
    names = {file.name for file in files}
    assert names >= {"table-item.safetensors", "table-user-gender.safetensors", "model.safetensors", "items.parquet"}
    assert names >= {"scorer.json", "config.json", "item-counts.safetensors", "user-values.parquet", CHECKSUMS}
    for file in files:
        whole = file.read_bytes()
        for place in (0, 0.5, 1):
            file.write_bytes(flipped(file, place))
            with pytest.raises(UserError) as refusal:
                model.scorer()
            line = str(refusal.value)
            assert "\n" not in line
            # A changed list of checksums may fit no other file.
            assert file.name in line or file.name == CHECKSUMS
            assert line.endswith("or register the model again")
            with pytest.raises(DataError):
                load_export(model.directory)
            file.write_bytes(whole)
    assert model.scorer().digest == model.digest


def test_missing_added_and_cut_files_are_refused(data, export):
    model = export(data)
    listed, table = model.directory / CHECKSUMS, model.directory / "table-genre.safetensors"
    whole = listed.read_bytes()
    for content in (b"", b"{", b"5", b"null", b"[1]"):
        listed.write_bytes(content)
        with pytest.raises(UserError, match=r"checksums\.json: is not a list of checksums, it is damaged"):
            model.scorer()
    listed.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"config\.json: is not in checksums\.json"):
        model.scorer()
    listed.unlink()
    with pytest.raises(UserError, match=r"checksums\.json: is missing"):
        model.scorer()
    listed.write_bytes(whole)
    content = table.read_bytes()
    table.unlink()
    with pytest.raises(UserError, match=r"table-genre\.safetensors: is missing"):
        model.scorer()
    table.write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"table-genre\.safetensors: its checksum"):
        model.scorer()
    table.write_bytes(content)
    (model.directory / "more.txt").write_text("x")
    with pytest.raises(UserError, match=r"more\.txt: is not in checksums\.json: remove the file"):
        model.scorer()


def test_a_model_of_before_the_checksums_loads_and_this_is_said_once(data, export, caplog):
    model = export(data)
    with_checksums = model.scorer()
    assert not caplog.records
    (model.directory / CHECKSUMS).unlink()
    settings = json.loads((model.directory / "scorer.json").read_text())
    del settings["checksums"]
    (model.directory / "scorer.json").write_text(json.dumps(settings))
    for _ in range(3):
        assert np.array_equal(model.scorer().item_IC, with_checksums.item_IC)
    assert [record.getMessage() for record in caplog.records] == [
        f"{model.directory}: was registered without checksums, so damage would not be noticed: register the model again"
    ]


def test_newer_counters_of_items_change_scores_but_not_the_digest(data, export):
    model = export(data, prior=True, max_history=50)
    file, before = model.directory / COUNTERS, model.scorer()
    request = {"history": [[105]], "history_time": [[600_000]], "candidates": [[100, 101]], "time": [10 * MS_PER_DAY]}
    first = before.predict(None, pd.DataFrame(request))["scores"][0]
    counters = load_file(file)
    assert (counters["day_K"] == 0).all()
    row = int(before.rows(pa.array([100]))[0])
    counters["events_K"] = counters["events_K"] + 1000 * (counters["row_K"] == row).int()
    save_file(counters, file)
    # They are of the data, but a damaged file is still refused.
    with pytest.raises(UserError, match=rf"{COUNTERS}: its checksum"):
        model.scorer()
    write_checksums(model.directory)
    after = model.scorer()
    assert after.digest == before.digest == model.digest
    second = after.predict(None, pd.DataFrame(request))["scores"][0]
    assert abs(second[0] - first[0]) > 1e-2
    assert second[1] == pytest.approx(first[1], abs=1e-5)


def test_a_model_without_a_prior_has_no_counters_and_a_digest_of_all_its_files(data, export):
    plain = export(data)
    assert not (plain.directory / COUNTERS).exists()
    # The digest that states of registered models carry.
    files = sorted(plain.directory.iterdir())
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    assert plain.digest == hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def test_every_other_file_of_a_model_with_counters_is_in_its_digest(data, export):
    directory = export(data, prior=True).directory
    digests, found = file_digests(directory), set()
    for name in sorted(digests.keys() - {CHECKSUMS, COUNTERS}):
        found.add(export_digest(digests | {name: "other"}))
    assert len(found) == len(digests) - 2
    assert export_digest(digests) not in found


def test_checksums_are_those_of_the_files_as_they_are_when_written_again(data, export):
    model = export(data)
    before = (model.directory / CHECKSUMS).read_bytes()
    write_checksums(model.directory)
    assert (model.directory / CHECKSUMS).read_bytes() == before
    assert CHECKSUMS not in json.loads(before)
