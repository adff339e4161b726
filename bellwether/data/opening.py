"""Files as text or bytes, whatever they are packed and encoded with.

``.gz`` and ``.zst`` are unpacked while they are read, and bounded, since a small file may unpack to a disk full. Text
is UTF-8 unless the file begins with the mark of another Unicode form, or the recipe names an encoding.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO, cast

from bellwether.errors import DataError
from bellwether.tools.words import byte_size

# What a file may hold once it is unpacked: so many bytes, or for a larger file so many times its own.
UNPACKED = 2_000_000_000
UNPACKED_PER_BYTE = 100
PACKED = (".gz", ".zst")
BLOCK = 1 << 20  # bytes or characters that are read at once where nothing of them is kept

# Longer marks first: UTF-32's begins as UTF-16's does. The encodings drop the mark.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def kind_of(path: Path) -> str:
    """Return the ending that says how a file is read, in lower case, such as ``.jsonl`` of ``a.JSONL.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def stem_of(path: Path) -> str:
    """Return a file's name without the endings that say how it is read."""
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked where its ending says that it is packed.

    Raises:
        DataError: what unpacks it is not installed, it is not packed as its ending says, or it holds far too much.
    """
    packed = path.suffix.lower()
    with path.open("rb") as file:
        if packed not in PACKED:
            yield file
            return
        most = max(UNPACKED, UNPACKED_PER_BYTE * path.stat().st_size)
        try:
            opened = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed == ".gz" else _zst(file, path)
            with opened, io.BufferedReader(_Bounded(opened, path, most)) as bounded:
                yield bounded
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path}: the file is not packed as {packed} ({error}); pack it anew.") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"{path}: the file is not packed as {packed} ({error}); pack it anew.") from error


@contextlib.contextmanager
def open_text(path: Path, newline: str, encoding: str | None) -> Iterator[TextIO]:
    """Open a text file for reading.

    Args:
        path: the file.
        newline: as Python's ``open`` takes it.
        encoding: its encoding; None takes the Unicode form whose mark it begins with, else UTF-8.
    """
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding=encoding or mark_of(path), newline=newline) as text:
        yield text


def mark_of(path: Path) -> str:
    """Return the encoding whose mark a file begins with; UTF-8 where there is none."""
    with open_bytes(path) as file:
        first = file.read(4)
    return next((encoding for mark, encoding in _MARKS if first.startswith(mark)), "utf-8")


def not_decoded(path: Path, name: str, encoding: str | None) -> DataError:
    """Return the error that names the first byte of a file that is not in its encoding."""
    used = encoding or mark_of(path)
    decoder, offset, line = codecs.getincrementaldecoder(used)(), 0, 1
    block = b""
    with open_bytes(path) as file:
        try:
            while block := file.read(BLOCK):
                line += decoder.decode(block).count("\n")
                offset += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # What is decoded begins with the bytes of a character that the block before ended within.
            offset += error.start - (len(error.object) - len(block))
            line += error.object.count(b"\n", 0, error.start)
    called = "UTF-8" if used.startswith("utf-8") else used
    how = "save the file as UTF-8, or name its encoding in data.encoding, such as cp1252 (init: --encoding cp1252)"
    return DataError(f"{name}:{line}: byte {offset} is not {called}; {how}.")


class _Bounded(io.RawIOBase):
    """Reads what is unpacked, as long as it is not far more than the file promises."""

    def __init__(self, file: IO[bytes], path: Path, most: int) -> None:
        self._file, self._path, self._most, self._left = file, path, most, most

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read some bytes."""
        found = self._file.read(len(buffer))
        self._left -= len(found)
        if self._left < 0:
            raise DataError(
                f"{self._path}: the file holds more than {byte_size(self._most)} when it is unpacked; give a part."
            )
        buffer[: len(found)] = found
        return len(found)


def _zst(file: IO[bytes], path: Path) -> IO[bytes]:
    """Return what unpacks a .zst file."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path}: .zst files need the package zstandard; install bellwether with its extra 'files', or unpack it."
        ) from error
    reader: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return reader
