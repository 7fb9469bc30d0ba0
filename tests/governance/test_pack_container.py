"""The container of an evidence pack has one form: any zip program reads it, and no byte of it changes unseen."""

import io
import zipfile
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance import pack_container
from governance.pack_container import Container, ContainerWriter, content, lines, read_container, stamp_of
from tests.governance.packs import packed

MOMENT = datetime(2026, 11, 22, 10, 37, 39, tzinfo=UTC)
names = st.from_regex(r"[a-z0-9_][a-zA-Z0-9_./-]{0,20}", fullmatch=True)
contents = st.lists(st.tuples(names, st.binary(max_size=60)), min_size=1, max_size=5, unique_by=lambda each: each[0])


def read(file: bytes) -> Container:
    return read_container(io.BytesIO(file))


@given(contents)
def test_what_was_written_is_read_and_any_zip_program_reads_it_too(members: list[tuple[str, bytes]]) -> None:
    file = packed(members, MOMENT)
    found = read(file)
    assert (found.problems, found.stamp) == ((), stamp_of(MOMENT))
    assert [(each.name, b"".join(content(io.BytesIO(file), each))) for each in found.members] == members
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
        assert [(name, archive.read(name)) for name in archive.namelist()] == members
        assert {info.date_time for info in archive.infolist()} == {(2026, 11, 22, 10, 37, 38)}


@given(contents, st.data())
def test_a_byte_that_was_changed_is_found_and_in_a_member_the_member_is_named(
    members: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    file = bytearray(packed(members, MOMENT))
    place = data.draw(st.integers(0, len(file) - 1))
    whole = read(bytes(file))
    file[place] ^= data.draw(st.integers(1, 255))
    if found := read(bytes(file)).problems:
        inside = [each.name for each in whole.members if each.begin <= place < each.begin + each.size]
        assert not inside or found[0][0] == inside[0]
    else:  # all members bear one time: of a single one it is for the pack to say which
        assert len(members) == 1 or place < whole.members[1].header
        assert read(bytes(file)).stamp != whole.stamp


@given(contents, st.data())
def test_a_file_that_was_cut_off_or_goes_on_or_has_bytes_put_in_is_none(
    members: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    file = packed(members, MOMENT)
    assert read(file[: data.draw(st.integers(0, len(file) - 1))]).problems
    more = data.draw(st.binary(min_size=1, max_size=20))
    assert read(file + more).problems
    place = data.draw(st.integers(0, len(file)))
    put_in = file[:place] + more + file[place:]
    assert read(put_in).problems or put_in == file


def test_comments_flags_compression_and_directories_are_not_taken() -> None:
    def made(edit: "zipfile.ZipFile", **more: object) -> None:
        edit.writestr("a.txt", b"text" * 50, **more)  # type: ignore[arg-type]

    for change in ("comment", "deflated", "directory", "plain"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            made(archive, compress_type=zipfile.ZIP_DEFLATED if change == "deflated" else zipfile.ZIP_STORED)
            if change == "comment":
                archive.comment = b"hello"
            if change == "directory":
                archive.mkdir("folder")
        assert read(file.getvalue()).problems, change


def test_what_does_not_fit_32_bits_stands_in_zip64_fields_that_other_programs_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = [("a", b"x" * 10), ("b", b"y" * 300), ("c", b"z")]
    monkeypatch.setattr(pack_container, "_LARGE", 200)
    file = packed(members, MOMENT)
    assert read(file).problems == ()
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
        assert [(name, archive.read(name)) for name in archive.namelist()] == members
    monkeypatch.undo()
    assert read(file).problems


def test_a_member_has_the_size_that_was_announced_and_a_name_that_names_no_place_elsewhere() -> None:
    writer = ContainerWriter(io.BytesIO(), MOMENT)
    with pytest.raises(ValueError, match="3 bytes, not 2"):
        writer.add("a", 2, [b"abc"])
    for name in ("/etc/passwd", "../a", "ä", ""):
        with pytest.raises(ValueError, match="not a member's name"):
            writer.add(name, 0, [])


@given(st.lists(st.binary(max_size=8).map(lambda text: text.replace(b"\n", b"")), max_size=6), st.booleans())
def test_lines_are_those_of_the_content_wherever_its_blocks_end(written: list[bytes], finished: bool) -> None:
    text = b"\n".join(written) + (b"\n" if finished else b"")
    file = io.BytesIO(packed([("a", text)], MOMENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_container, "_BLOCK", 3)
        assert list(lines(file, read_container(file).members[0])) == io.BytesIO(text).readlines()
