"""The container of an evidence pack: a zip file in the one form that its members have.

Any program that reads zip files reads it, but not every zip file is one. Members are stored, not compressed, one behind
the other from the first byte on; there are no comments, flags, directories, attributes to choose or bytes in between;
the directory at the end repeats the members in their order, and the file ends with it. All members bear one time. Sizes
and offsets that do not fit 32 bits, and no others, stand in ZIP64 fields. So whoever knows the members' names, their
content and the time knows every byte, and `read_container` compares them all.

Compression would leave a choice: programs compress the same bytes differently.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_VERSION = 45
_UNIX = 3 << 8
_ATTRIBUTES = 0o100644 << 16
_LARGE = 0xFFFFFFFF
_MANY = 0xFFFF
_BLOCK = 1 << 20
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_./-]{0,200}")


@dataclass(frozen=True)
class Member:
    """A member of a container.

    Attributes:
        name: its name.
        size: bytes of its content.
        crc: CRC-32 of its content.
        sha256: of its content.
        header: offset of its header in the file.
        begin: offset of its content.
    """

    name: str
    size: int
    crc: int
    sha256: str
    header: int
    begin: int


@dataclass(frozen=True)
class Container:
    """What was found in a file.

    Attributes:
        members: in the order of the file, as far as it could be followed.
        stamp: date and time of the members, as zip files write them.
        problems: the part that is not as an export writes it, and what is wrong. If there is one, the members must not
            be relied on.
    """

    members: tuple[Member, ...]
    stamp: tuple[int, int]
    problems: tuple[tuple[str, str], ...]


def stamp_of(moment: datetime) -> tuple[int, int]:
    """A time as zip files write it: date and time of day, in UTC, to two seconds. The format begins in 1980."""
    at = max(moment.astimezone(UTC), datetime(1980, 1, 1, tzinfo=UTC))
    return (at.year - 1980) << 9 | at.month << 5 | at.day, at.hour << 11 | at.minute << 5 | at.second // 2


class ContainerWriter:
    """Writes a container, member by member.

    Args:
        file: empty, and written from its beginning.
        moment: what all members bear as their time.
    """

    def __init__(self, file: BinaryIO, moment: datetime) -> None:
        self._file = file
        self._stamp = stamp_of(moment)
        self._position = 0
        self.members: list[Member] = []

    def add(self, name: str, size: int, blocks: Iterable[bytes]) -> Member:
        """Write a member.

        Args:
            name: letters, digits and `_./-`.
            size: how many bytes the blocks are together.
            blocks: its content.

        Raises:
            ValueError: the name is none, or the content has another size.
            OSError: the file cannot be written.
        """
        if _NAME.fullmatch(name.encode()) is None:
            raise ValueError(f"{name!r} is not a member's name")
        header = self._position
        begin = header + len(_local(name, size, 0, self._stamp))
        self._file.seek(begin)
        crc, digest, written = 0, hashlib.sha256(), 0
        for block in blocks:
            self._file.write(block)
            crc = zlib.crc32(block, crc)
            digest.update(block)
            written += len(block)
        if written != size:
            raise ValueError(f"{name} has {written} bytes, not {size}")
        self._file.seek(header)
        self._file.write(_local(name, size, crc, self._stamp))
        self._position = begin + size
        self._file.seek(self._position)
        member = Member(name, size, crc, digest.hexdigest(), header, begin)
        self.members.append(member)
        return member

    def finish(self) -> None:
        """Write the directory.

        Raises:
            OSError: the file cannot be written.
        """
        self._file.write(b"".join(_directory(self.members, self._stamp, self._position)))


def read_container(file: BinaryIO) -> Container:
    """Read a file from its first byte to its last, and name the first that is not as `ContainerWriter` writes it.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, 2)
    position, members, problems = 0, list[Member](), list[tuple[str, str]]()
    stamp = (0, 0)
    while _at(file, position, 4) == _LOCAL_SIGNATURE:
        found = _read_local(file, position, size, stamp if members else None)
        if isinstance(found, str):
            problems.append((_after(members), found))
            return Container(tuple(members), stamp, tuple(problems))
        member, stamp, crc = found
        if crc != member.crc:
            problems.append((member.name, "its bytes do not have the checksum that its header gives: it was changed"))
        members.append(member)
        position = member.begin + member.size
    if not problems:
        problems += _directory_problems(file, position, size, members, stamp)
    return Container(tuple(members), stamp, tuple(problems))


def content(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """The content of a member in blocks."""
    position, end = member.begin, member.begin + member.size
    while position < end:
        block = _at(file, position, min(_BLOCK, end - position))
        if not block:
            return
        position += len(block)
        yield block


def lines(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """The lines of a member with their ends; the last one may lack it."""
    rest = b""
    for block in content(file, member):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _read_local(
    file: BinaryIO, position: int, size: int, stamp: tuple[int, int] | None
) -> tuple[Member, tuple[int, int], int] | str:
    """The member at a position, the time that it bears and the checksum of its bytes; or what is wrong with its header.

    The member's own checksum is the one that its header gives.
    """
    raw = _at(file, position, _LOCAL.size)
    if len(raw) < _LOCAL.size:
        return "a header begins here and is cut off"
    _, _, _, _, time, date, crc, _, length, name_length, _ = _LOCAL.unpack(raw)
    name_bytes = _at(file, position + _LOCAL.size, name_length)
    if _NAME.fullmatch(name_bytes) is None:
        return f"a header begins here that names no member: {name_bytes[:60]!r}"
    name = name_bytes.decode("ascii")
    if length == 0xFFFFFFFF:
        wide = _at(file, position + _LOCAL.size + name_length + 4, 8)
        length = int.from_bytes(wide, "little")
    expected = _local(name, length, crc, stamp or (date, time))
    begin = position + len(expected)
    if _at(file, position, len(expected)) != expected:
        return f"the header of {name} is not as an export writes it"
    if begin + length > size:
        return f"{name} is cut off: {length:,} bytes are announced, {max(0, size - begin):,} are left"
    checksum, digest = 0, hashlib.sha256()
    for block in content(file, Member(name, length, crc, "", position, begin)):
        checksum = zlib.crc32(block, checksum)
        digest.update(block)
    return Member(name, length, crc, digest.hexdigest(), position, begin), stamp or (date, time), checksum


def _directory_problems(
    file: BinaryIO, position: int, size: int, members: Sequence[Member], stamp: tuple[int, int]
) -> Iterator[tuple[str, str]]:
    """The first part of the directory that is another than that of the members."""
    if not members:
        yield "file", "it is not an evidence pack: no member begins at its first byte"
        return
    parts = list(_directory(members, stamp, position))
    subjects = [f"directory entry of {member.name}" for member in members] + ["end of the directory"]
    for subject, part in zip(subjects, parts, strict=True):
        if _at(file, position, len(part)) != part:
            yield subject, f"it is not as an export writes it, or something stands {_after(members)}"
            return
        position += len(part)
    if position != size:
        yield "file", f"{size - position:,} bytes stand behind the end of the directory"


def _after(members: Sequence[Member]) -> str:
    return f"after {members[-1].name}" if members else "file"


def _local(name: str, size: int, crc: int, stamp: tuple[int, int]) -> bytes:
    date, time = stamp
    extra, field = b"", size
    if size >= _LARGE:
        extra, field = struct.pack("<2H2Q", 1, 16, size, size), 0xFFFFFFFF
    named = name.encode("ascii")
    fixed = _LOCAL.pack(_LOCAL_SIGNATURE, _VERSION, 0, 0, time, date, crc, field, field, len(named), len(extra))
    return fixed + named + extra


def _directory(members: Sequence[Member], stamp: tuple[int, int], begin: int) -> Iterator[bytes]:
    """The entries of the members, and the end."""
    length = 0
    for member in members:
        entry = _entry(member, stamp)
        length += len(entry)
        yield entry
    count, end = len(members), b""
    if count >= _MANY or length >= _LARGE or begin >= _LARGE:
        end = _END_64.pack(b"PK\x06\x06", 44, _UNIX | _VERSION, _VERSION, 0, 0, count, count, length, begin)
        end += _LOCATOR.pack(b"PK\x06\x07", 0, begin + length, 1)
    few = min(count, 0xFFFF)
    yield end + _END.pack(b"PK\x05\x06", 0, 0, few, few, min(length, 0xFFFFFFFF), min(begin, 0xFFFFFFFF), 0)


def _entry(member: Member, stamp: tuple[int, int]) -> bytes:
    date, time = stamp
    wide, size, header = b"", member.size, member.header
    if size >= _LARGE:
        wide, size = struct.pack("<2Q", size, size), 0xFFFFFFFF
    if header >= _LARGE:
        wide, header = wide + struct.pack("<Q", header), 0xFFFFFFFF
    extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
    named = member.name.encode("ascii")
    fixed = _ENTRY.pack(
        b"PK\x01\x02",
        _UNIX | _VERSION,
        _VERSION,
        0,
        0,
        time,
        date,
        member.crc,
        size,
        size,
        len(named),
        len(extra),
        0,
        0,
        0,
        _ATTRIBUTES,
        header,
    )
    return fixed + named + extra


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
