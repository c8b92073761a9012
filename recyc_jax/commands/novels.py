"""Six novels of Jane Austen from a Debian package: long English texts in the public domain."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from recyc_jax.loading import fetch

PACKAGE = "r-cran-janeaustenr"
MEMBER = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def fetched() -> Path:
    """The database of the novels, fetched once. Raises fetch.UnavailableError."""
    return fetch.debian_file(PACKAGE, MEMBER, fetch.cache_dir() / "novels.rdb")


def texts(file: Path) -> Iterator[str]:
    """The character vectors of an R lazy-load database, each joined by newlines, in the file's order.

    The file is a sequence of records: a 4-byte big-endian size, then a zlib stream of R's XDR serialisation. Raises
    ValueError for any other file.
    """
    data = file.read_bytes()
    try:
        while data:
            stream = zlib.decompressobj()
            record = stream.decompress(data[4:])
            yield "\n".join(_character_vector(record))
            data = stream.unused_data
    except (zlib.error, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not an R database of character vectors ({error})") from None


def _character_vector(record: bytes) -> Iterator[str]:
    """The strings of a serialised STRSXP (format 3: header, native encoding, then the vector)."""
    (encoding_size,) = struct.unpack_from(">i", record, 14)
    at = 18 + encoding_size
    flags, count = struct.unpack_from(">ii", record, at)
    if flags & 0xFF != 16:
        raise struct.error("the record is no character vector")
    at += 8
    for _ in range(count):
        _, size = struct.unpack_from(">ii", record, at)
        at += 8
        if size > 0:  # -1 is NA
            yield record[at : at + size].decode("utf-8")
            at += size
        else:
            yield ""
