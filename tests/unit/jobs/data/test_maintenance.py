"""Users forgotten by the command, also in what a workspace holds of them: exit codes, lines, and the check."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from jobs.cli import run
from jobs.cluster.session import ClusterConfig
from jobs.data.remains import clean_states
from jobs.host.console import Console
from jobs.serving.build_states import build_states
from jobs.serving.ranking import ScoreConfig
from jobs.serving.score import score
from jobs.serving.stored_states import find_states
from pipeline.events import EventColumns
from pipeline.prepare.garbage import collect
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease
from tests.support.serial import command_without_ray


@pytest.fixture
def solar(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, without Ray: exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    command_without_ray(monkeypatch.setattr)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run([*arguments, "-v"])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def names(prepare, write_log, tmp_path):
    """A data set `shards` of users whose ids differ in a space or in a separator of lines alone."""
    users = ["ada", " ada", "bea\u2028cleo", "bea", "cleo"]
    write_log({"user_id": users, "item_id": [1] * 5, "timestamp": range(1, 6)})
    prepare(tmp_path / "log", tmp_path / "shards", buckets=2)
    return str(tmp_path / "shards")


def left(path: str) -> list[str]:
    return sorted(Shards.open(path).index_table()["user_id"].to_list())


def test_each_line_names_exactly_one_user(solar, names, tmp_path):
    (tmp_path / "left.txt").write_bytes("\ufeff ada\r\nbea\u2028cleo\r\n\r\n".encode())
    assert solar("forget", "shards", "--users", "left.txt", "--verify")[0] == 1
    code, output, _ = solar("forget", "shards", "--users", "left.txt")
    assert code == 0
    assert "2 of 2 users were found, 2 events" in output
    assert "1 empty lines of left.txt" in output
    assert left(names) == ["ada", "bea", "cleo"]
    code, output, _ = solar("forget", "shards", "--users", "left.txt", "--verify")
    assert (code, output) == (0, "nothing is left of these 2 users in the data set and in workspace\n")


def test_ids_that_are_not_there_are_named_and_do_not_block_the_others(solar, names, tmp_path):
    pl.DataFrame({"who": ["ada", "ada ", "\x1b[31mx"]}).write_csv(tmp_path / "left.csv")
    arguments = ("forget", "shards", "--users", "left.csv", "--users_column", "who")
    code, output, _ = solar(*arguments)
    assert code == 3
    assert "2 of the ids were never in the data set: '\\x1b[31mx', 'ada '" in output
    assert left(names) == [" ada", "bea", "bea\u2028cleo", "cleo"]
    # They are remembered: the same list once more is done already.
    code, output, _ = solar(*arguments)
    assert code == 0
    assert "3 of them were named to an earlier `solar forget`" in output
    (tmp_path / "left.txt").write_text("nobody\nbea\n")
    assert solar("forget", "shards", "--users", "left.txt", "--missing", "ok")[0] == 0
    code, _, errors = solar("forget", "shards", "--users", "left.csv")
    assert code == 2
    assert "left.csv: no column 'user_id'; it has 'who'" in errors


def test_text_that_is_no_integer_is_refused_before_any_work(solar, data, tmp_path):
    (tmp_path / "left.txt").write_text("3\nada\n")
    code, _, errors = solar("forget", "shards", "--users", "left.txt")
    assert code == 2
    assert "1 of 2 ids are not integers of 64 bits" in errors
    assert Shards.open(data.path).manifest == data.manifest


def test_states_and_results_in_the_workspace_are_cleaned_or_named(solar, data, export, tmp_path):
    model, states = export(data), Path("workspace/states/tiny/1")
    build_states(model, shards=data.path, manifest=None, out=states, console=Console(), cluster=ClusterConfig())
    pl.DataFrame({"user_id": [3, 4, 5], "candidates": [[100, 101]] * 3}).write_parquet("requests.parquet")
    results = [Path("workspace/scores.parquet"), Path("workspace/more/scores.out")]
    for result in results:
        score(model, ScoreConfig(requests="requests.parquet", out=str(result), states=str(states)), Console())
    Path("left.txt").write_text("3\n5\n")
    check = ("forget", "shards", "--users", "left.txt", "--verify")
    output = solar(*check)[1]
    assert f"{states}/00000001: states of 2 of them" in output
    assert all(f"{result}: 2 rows of them; clean it with --outputs" in output for result in results)

    code, output, _ = solar("forget", "shards", "--users", "left.txt", "--outputs", str(results[0]))
    assert code == 0
    assert "2 rows of results, 2 stored states; manifest 2" in output
    assert pq.read_table(results[0])["user_id"].to_pylist() == [4]
    found = find_states(model, states)
    assert found is not None
    assert [state is not None for state in found.read(pl.Series([3, 4, 5]).to_arrow())] == [False, True, False]
    code, output, _ = solar(*check)
    assert (code, output) == (1, f"still there: {results[1]}: 2 rows of them; clean it with --outputs\n")


def test_states_of_a_collected_manifest_are_cleaned_and_those_of_another_data_set_are_not(solar, data, export):
    model = export(data)
    for name in ("tiny", "other"):
        out = Path("workspace/states") / name / "1"
        build_states(model, shards=data.path, manifest=None, out=out, console=Console(), cluster=ClusterConfig())
    other = Path("workspace/states/other/1/00000001")
    for file in other.glob("bucket-*"):
        table = pq.read_table(file)
        identity = json.loads(table.schema.metadata[b"solar.states"]) | {"manifest_fingerprint": "another"}
        pq.write_table(table.replace_schema_metadata({"solar.states": json.dumps(identity)}), file)
    Path("none.txt").write_text("1000\n")
    Path("left.txt").write_text("3\n")
    assert solar("forget", "shards", "--users", "none.txt", "--missing", "ok")[0] == 0
    assert collect(data.path, keep=1).manifests == [1]
    assert clean_states("workspace", ["3"], data=data.path) == 1
    assert solar("forget", "shards", "--users", "left.txt", "--workspace", "workspace")[0] == 0
    output = solar("forget", "shards", "--users", "left.txt", "--verify")[1]
    assert output == (
        f"still there: {other}: states of 1 of them, built from another data set, which is not in workspace/shards: "
        f"remove them with `solar forget` on that, or remove {other}\n"
    )


def test_states_of_another_data_set_are_named_with_the_command_that_cleans_them(solar, data, export, prepare, tmp_path):
    other = "workspace/shards/other"
    prepare(tmp_path / "log", tmp_path / other, columns=EventColumns(action="action", label="label"), buckets=2)
    out = Path("workspace/states/other/1")
    build_states(
        export(Shards.open(other)), shards=other, manifest=None, out=out, console=Console(), cluster=ClusterConfig()
    )
    Path("left.txt").write_text("3\n")
    assert solar("forget", "shards", "--users", "left.txt")[0] == 0
    code, output, _ = solar("forget", "shards", "--users", "left.txt", "--verify")
    command = f"solar forget {other} --users left.txt"
    assert (code, output) == (
        1, f"still there: {out}/00000001: states of 1 of them, built from {other}: remove them with `{command}`\n"
    )  # fmt: skip
    assert solar(*command.split()[1:])[0] == 0
    assert solar("forget", "shards", "--users", "left.txt", "--verify")[0] == 0


def test_unfinished_states_and_results_of_killed_commands_go_or_are_named(solar, data, export):
    model, states = export(data), Path("workspace/states/tiny/1")
    build_states(model, shards=data.path, manifest=None, out=states, console=Console(), cluster=ClusterConfig())
    (states / "00000001/COMMIT").unlink()
    Path("workspace/.scores.parquet.77.partial").write_bytes(b"PAR1")
    assert clean_states("workspace", ["3"], data=data.path) == 1
    assert not (states / "00000001").exists()
    Path("left.txt").write_text("3\n")
    assert (
        ".scores.parquet.77.partial: left by a killed"
        in solar("forget", "shards", "--users", "left.txt", "--verify")[1]
    )


def test_commands_whose_state_goes_are_named_and_gc_names_those_whose_state_stays(solar, names):
    def reading(number: int):
        return lease(names, number=number, command="training of run small", tell=pytest.fail)

    Path("left.txt").write_text("ada\n")
    told = f"training of run small (process {os.getpid()} on "
    with reading(1):
        assert f"ends         {told}" in solar("forget", "shards", "--users", "left.txt")[1]
    Path("left.txt").write_text("nobody\n")
    with reading(2):
        assert "ends " not in solar("forget", "shards", "--users", "left.txt")[1]
        output = solar("gc", "shards", "--keep", "1")[1]
    assert f"kept          {told}" in output
    assert "removed       no manifest" in output
