"""Opens a file for reading: decompressed, and a JSON array as JSON lines. What a file holds is checked by its first
bytes, so that a file with a wrong ending is named instead of read as text."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.events import DataError
from pipeline.log.json_arrays import array_lines, is_array
from pipeline.storage import locate

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".zip")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
"""What Arrow decompresses, by its names. Arrow fails at an empty bz2 stream before another one."""
_DECODERS: Mapping[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
_HOLDS = {
    ".gz": rb"\x1f\x8b",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\x00",
    ".zip": rb"PK\x03\x04",
    ".parquet": rb"PAR1",
    ".arrow": rb"ARROW1\x00\x00",
    ".avro": rb"Obj\x01",
}
"""The first bytes of a file by the ending that it should have."""
_HEAD_BYTES = 64
_CHUNK_BYTES = 1 << 20


def open_raw(url: str, *, name: str) -> IO[Any]:
    """The file's bytes as stored. DataError if it cannot be opened."""
    fs, path = locate(url)
    try:
        return open(path, "rb") if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{name}: cannot be opened ({error.strerror or error}); check the file") from error


def open_content(url: str, *, name: str, form: str, compression: str | None) -> IO[Any]:
    """The file's content: for `form` parquet a stream that can seek, for csv and jsonl text.

    DataError: the file cannot be opened, or its first bytes say that it holds something else. Damage in a compressed
    file is an OSError while it is read.
    """
    stream: Any = open_raw(url, name=name)
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    _refuse_other(head, compression or (".parquet" if form == "parquet" else None), name=name)
    if compression:
        stream = _decompressed(stream, compression, name=name)
        if form == "parquet":
            return _seekable(stream, name=name)
        _refuse_other(_peek(stream, name=name), None, name=name)
    elif form == "jsonl" and not isinstance(stream, io.BufferedReader):
        stream = io.BufferedReader(stream, _CHUNK_BYTES)
    if form == "jsonl" and is_array(_peek(stream, name=name)):
        return _stream_of(array_lines(stream, name=name), stream)
    return stream


def _refuse_other(head: bytes, expected: str | None, *, name: str) -> None:
    """DataError if the first bytes are those of another ending. `expected`: None = text."""
    held = next((ending for ending, pattern in _HOLDS.items() if re.match(pattern, head)), None)
    if held == expected or not head or (held is None and expected == ".parquet"):
        # What is neither Parquet nor known is judged where Parquet is read.
        return
    found = f"holds {held} data" if held else f"does not hold {expected} data"
    raise DataError(f"{name}: {found}, whatever its name says; give the file the ending of what it holds")


def _peek(stream: Any, *, name: str) -> bytes:
    try:
        return stream.peek(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({' '.join(str(error).split())}); copy it again") from error


def _decompressed(stream: IO[Any], compression: str, *, name: str) -> IO[Any]:
    if compression == ".zip":
        return _stream_of(_without_zip(stream, name=name), stream)
    if compression in _DECODERS:
        return _stream_of(_decoded(stream, _DECODERS[compression]), stream)
    packed = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), _CODECS[compression])
    return _stream_of(_chunks(packed), stream)


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _decoded(stream: IO[Any], new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one or more compressed streams. lzma.open and bz2.open would ignore damaged bytes after the first
    one."""
    decoder, packed = new_decoder(), stream.read(_CHUNK_BYTES)
    while packed:
        if decoder.eof:
            # Between two streams there may be zeros.
            packed = packed.lstrip(b"\0")
            decoder = new_decoder() if packed else decoder
        unused = b""
        if packed:
            try:
                yield decoder.decompress(packed, _CHUNK_BYTES)
                while not decoder.eof and not decoder.needs_input:
                    yield decoder.decompress(b"", _CHUNK_BYTES)
            except lzma.LZMAError as error:
                raise OSError(str(error)) from error
            unused = decoder.unused_data
        packed = unused or stream.read(_CHUNK_BYTES)
    if not decoder.eof:
        raise OSError("Truncated compressed stream")


def _without_zip(stream: IO[Any], *, name: str) -> Iterator[bytes]:
    try:
        yield from _chunks(_only_member(stream, name=name))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise OSError(str(error) or "Truncated compressed stream") from error


def _only_member(stream: IO[Any], *, name: str) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(stream)
        members = [
            info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX")
        ]
        if len(members) == 1:
            return archive.open(members[0])
    except (RuntimeError, NotImplementedError) as error:
        raise DataError(f"{name}: cannot be unpacked ({error}); unpack it and name the directory") from error
    raise DataError(f"{name}: holds {len(members)} files; unpack it and name the directory")


def _seekable(stream: IO[Any], *, name: str) -> IO[Any]:
    """The whole content in a temporary file that has no name."""
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with stream:
        try:
            for chunk in _chunks(stream):
                unpacked.write(chunk)
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(f"{name}: cannot be read ({' '.join(str(error).split())}); copy it again") from error
    unpacked.seek(0)
    return unpacked


def _stream_of(chunks: Iterator[bytes], source: IO[Any]) -> io.BufferedReader:
    return io.BufferedReader(_ChunkStream(chunks, source), _CHUNK_BYTES)


class _ChunkStream(io.RawIOBase):
    """The bytes of an iterator as a stream, which closes their source with itself."""

    def __init__(self, chunks: Iterator[bytes], source: IO[Any]) -> None:
        self._chunks, self._source = chunks, source
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()
