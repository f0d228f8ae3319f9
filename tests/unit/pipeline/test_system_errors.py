"""What the system refuses is one line with the place and the way out; every other error stays what it is."""

from __future__ import annotations

import errno
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError

from pipeline.events import DataError, NotNow
from pipeline.system_errors import as_data_error, refusal


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "/x/y: No space left on device: free some disk; what was committed is still there"),
        (errno.EDQUOT, "/x/y: Disk quota exceeded: free some disk; what was committed is still there"),
        (errno.EACCES, "/x/y: Permission denied: name another place, or change its permissions"),
        (errno.EROFS, "/x/y: Read-only file system: name a place that can be written"),
    ],
)
def test_the_line_has_place_reason_and_way_out(number, told):
    assert refusal(OSError(number, "as a library says it", "/x/y")) == told


def test_an_error_without_a_file_gets_the_place_that_was_written():
    full = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    assert (
        refusal(full, place="log") == "log: No space left on device: free some disk; what was committed is still there"
    )
    assert refusal(full) == "disk: No space left on device: free some disk; what was committed is still there"


@pytest.mark.parametrize(
    ("name", "text", "kind", "told"),
    [
        ("NoCredentialsError", "Unable to locate credentials", DataError, "set AWS_ACCESS_KEY_ID"),
        ("EndpointConnectionError", "Could not connect", NotNow, "check AWS_ENDPOINT_URL"),
        ("PermissionError", "Forbidden", DataError, "check the credentials"),
    ],
)
def test_what_an_object_store_refuses_is_one_line(name, text, kind, told):
    error = PermissionError(text) if name == "PermissionError" else type(name, (Exception,), {})(text)
    outer = RuntimeError("task failed")
    outer.__cause__ = error
    found = as_data_error(outer)
    assert type(found) is kind
    assert str(found).startswith(f"object store: {text}: {told}")


def test_the_cause_counts_whatever_wraps_it():
    class Wrapped(Exception):
        """As Ray wraps the errors of its tasks."""

        def __init__(self, cause: BaseException) -> None:
            super().__init__("task failed")
            self.cause = cause

    outer = RuntimeError("group failed")
    outer.__cause__ = Wrapped(OSError(errno.EROFS, "?", "/m"))
    assert refusal(outer) == "/m: Read-only file system: name a place that can be written"


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_libraries_with_errors_of_their_own_are_understood(error):
    assert refusal(error, place="w") == "w: No space left on device: free some disk; what was committed is still there"


def test_a_place_below_a_file_is_told_by_whoever_notices(tmp_path):
    file = tmp_path / "file"
    file.touch()
    table = pa.table({"a": [1]})
    for write in (
        lambda: (file / "below").mkdir(),
        lambda: file.mkdir(exist_ok=True),
        lambda: (file / "below").write_text("x"),
        lambda: pq.write_table(table, file / "below"),
    ):
        with pytest.raises(OSError, match=r"Not a directory|File exists") as raised:
            write()
        line = refusal(raised.value)
        assert line is not None
        assert line.startswith(f"{file}")
        assert line.endswith("Not a directory: a part of this path is a file: name another place")


@pytest.mark.parametrize(
    "error", [OSError("no number"), FileNotFoundError(errno.ENOENT, "?", "/x"), ValueError("disk"), KeyError("x")]
)
def test_other_errors_are_not_explained_away(error):
    assert refusal(error) is None
    assert as_data_error(error) is None


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc")
def test_a_place_where_nothing_can_be_created_is_told_and_a_missing_file_is_not(tmp_path):
    line = "/proc/x: No such file or directory: nothing can be created there: name another place"
    assert refusal(FileNotFoundError(errno.ENOENT, "?", "/proc/x")) == line
    assert refusal(FileNotFoundError(errno.ENOENT, "?", str(tmp_path / "x"))) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "?")) is None


def test_a_defect_in_the_handling_of_a_refusal_stays_a_defect():
    defect = KeyError("defect")
    defect.__context__ = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x")
    assert refusal(defect) is None


def test_a_full_disk_may_be_tried_again_and_a_wrong_place_not():
    assert type(as_data_error(OSError(errno.ENOSPC, "?"))) is NotNow
    assert type(as_data_error(OSError(errno.EFBIG, "?"))) is NotNow
    assert type(as_data_error(OSError(errno.EACCES, "?"))) is DataError
