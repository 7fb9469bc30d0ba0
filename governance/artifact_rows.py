"""Which rows a patch artifact holds, read without torch: the header and the `MODULE/rows` tensors, int64, alone."""

import json
import sys
from array import array
from typing import BinaryIO

_LENGTH = 8
_ROWS = "/rows"


def artifact_rows(file: BinaryIO, begin: int, size: int) -> dict[str, "array[int]"] | None:
    """The rows that an artifact changes in each module; None if it is no patch artifact.

    Args:
        file: holds the artifact.
        begin: where it begins.
        size: how many bytes it has.
    """
    file.seek(begin)
    length = int.from_bytes(file.read(_LENGTH), "little")
    data = _LENGTH + length
    if data > size:
        return None
    try:
        header = json.loads(file.read(length))
        rows = {name: header[name] for name in header if name.endswith(_ROWS)}
        return {
            name.removesuffix(_ROWS): _read(file, begin, size, data, entry["dtype"], *entry["data_offsets"])
            for name, entry in rows.items()
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None


def _read(file: BinaryIO, begin: int, size: int, data: int, dtype: str, first: int, last: int) -> "array[int]":
    if dtype != "I64" or not 0 <= first <= last <= size - data:
        raise ValueError(dtype)
    file.seek(begin + data + first)
    numbers = array("q", file.read(last - first))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
