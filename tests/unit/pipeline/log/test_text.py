import codecs

import pytest

from pipeline.events import DataError
from pipeline.log import text
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.text import UNREADABLE, text_pieces


def read(path, *, encoding="utf-8", size=3):
    (file,) = find_inputs(str(path), options=FileFormat(format="csv"))
    return b"".join(text_pieces(file, encoding=encoding, size=size))


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_tells_the_encoding_and_is_dropped(tmp_path, encoding, size):
    path, content = tmp_path / "log.csv", "user,ité\r\n1,\U0001f642\n"
    mark = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-16-le": codecs.BOM_UTF16_LE, "utf-32-be": codecs.BOM_UTF32_BE}
    path.write_bytes(mark.get(encoding, b"") + content.encode(encoding))
    assert read(path, size=size).decode() == content


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_lines_that_end_with_cr_alone_end_with_lf(tmp_path, size):
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b\r1,2\r\r\n3,4\r")
    assert read(path, size=size) == b"a,b\n1,2\n\n3,4\n"
    path.write_bytes(b"a,b\r\n1,\r2\n")
    assert read(path, size=size) == b"a,b\r\n1,\r2\n"
    path.write_bytes(b"a\r")
    assert read(path, size=size) == b"a\n"


def test_bytes_that_no_encoding_has_are_marked(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"a\x81\x80\n")
    assert read(path, encoding="cp1252").decode() == f"a{UNREADABLE}€\n"
    path.write_bytes(codecs.BOM_UTF16_LE + "a\ud83db".encode("utf-16-le", "surrogatepass") + b"c")
    assert read(path).decode() == f"a{UNREADABLE}b{UNREADABLE}"


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_of_an_endless_line_the_beginning_is_kept(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text, "LONGEST_LINE", 5)
    path = tmp_path / "log.csv"
    path.write_bytes(b"12345\n123456789012\n1\n12345678")
    assert read(path, size=size) == b"12345\n12345\0\n1\n12345\0"


def test_a_file_that_does_not_unpack_is_named(tmp_path):
    import gzip

    path = tmp_path / "log.csv.gz"
    packed = bytearray(gzip.compress(bytes(range(256)) * 99))
    packed[40:60] = b"\xff" * 20
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"log.csv.gz: cannot be read"):
        read(path)
