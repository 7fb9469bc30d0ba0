"""Nothing hostile or damaged in a safetensors file does more than raise an error by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from algorithms import checkpoints
from algorithms.checkpoints import read_stored
from algorithms.errors import CheckpointError
from algorithms.safetensors_files import MAX_HEADER_BYTES, read_header

WEIGHTS = "model.safetensors"


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / WEIGHTS
    save_file({"a": torch.arange(5.0), "b": torch.zeros(2, 2)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=WEIGHTS):
            read_header(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="belong to no tensor"):
        read_header(path)
    path.write_bytes(content)
    assert list(read_header(path).tensors) == ["a", "b"]


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(8)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "header longer than the file": ((10**6).to_bytes(8, "little") + b"{}", "declares a header"),
    "header over 100 MB": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "declares a header"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "declares a header"),
    "empty header": (bytes(8), "does not begin"),
    "leading space": (safetensors_bytes(b" {}"), "does not begin"),
    "no JSON": (safetensors_bytes(b"{"), "valid JSON"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "valid JSON"),
    "deep nesting": (safetensors_bytes(b'{"a":' + b"[" * 50_000), "valid JSON"),
    "trailing text": (safetensors_bytes(b"{} {}"), "valid JSON"),
    "long number": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "valid JSON"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": {}}'), "valid JSON"),
    "repeated tensor": (
        safetensors_bytes(f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}'.encode(), EIGHT),
        "repeats the key 'a'",
    ),
    "repeated field": (
        safetensors_bytes(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', EIGHT),
        "repeats the key 'dtype'",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
    "name with control characters": (safetensors_bytes({"a\x1b[2J": GOOD}, EIGHT), r"a\\x1b.*cannot be shown"),
    "empty name": (safetensors_bytes({"": GOOD}, EIGHT), "cannot be shown"),
    "tensor no object": (safetensors_bytes({"a": [1]}), "not described"),
    "missing field": (safetensors_bytes({"a": {"dtype": "F32", "shape": []}}), "not described"),
    "extra field": (safetensors_bytes({"a": {**GOOD, "x": 1}}, EIGHT), "not described"),
    "unknown dtype": (safetensors_bytes({"a": {**GOOD, "dtype": "F31"}}, EIGHT), "unknown dtype"),
    "dtype list": (safetensors_bytes({"a": {**GOOD, "dtype": ["F32"]}}, EIGHT), "unknown dtype"),
    "negative shape": (safetensors_bytes({"a": {**GOOD, "shape": [-2]}}, EIGHT), "impossible shape"),
    "fractional shape": (safetensors_bytes({"a": {**GOOD, "shape": [2.0]}}, EIGHT), "impossible shape"),
    "boolean shape": (safetensors_bytes({"a": {**GOOD, "shape": [True, 2]}}, EIGHT), "impossible shape"),
    "shape no list": (safetensors_bytes({"a": {**GOOD, "shape": 2}}, EIGHT), "impossible shape"),
    "shape beyond 64 bits": (safetensors_bytes({"a": {**GOOD, "shape": [2**64, 0]}}, EIGHT), "impossible shape"),
    "product beyond 64 bits": (safetensors_bytes({"a": {**GOOD, "shape": [2**32] * 1000}}, EIGHT), "8 bytes"),
    "shape of other size": (safetensors_bytes({"a": {**GOOD, "shape": [3]}}, EIGHT), "but 8 bytes"),
    "zero shape with bytes": (safetensors_bytes({"a": {**GOOD, "shape": [0]}}, EIGHT), "but 8 bytes"),
    "half bytes": (
        safetensors_bytes({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"), "but 1 bytes"
    ),
    "negative offset": (safetensors_bytes({"a": {**GOOD, "data_offsets": [-8, 0]}}, EIGHT), "impossible offsets"),
    "three offsets": (safetensors_bytes({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, EIGHT), "impossible offsets"),
    "offsets reversed": (safetensors_bytes({"a": {**GOOD, "data_offsets": [8, 0]}}, EIGHT), "lies at bytes"),
    "offset beyond the file": (safetensors_bytes({"a": {**GOOD, "data_offsets": [0, 8]}}, bytes(7)), "lies at bytes"),
    "hole at the start": (safetensors_bytes({"a": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)), "hole"),
    "hole between": (
        safetensors_bytes({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, bytes(20)), "b .* hole"
    ),
    "overlap": (safetensors_bytes({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)), "b .* overlaps"),
    "same bytes twice": (safetensors_bytes({"a": GOOD, "b": GOOD}, EIGHT), "overlaps"),
    "bytes after the last tensor": (safetensors_bytes({"a": GOOD}, bytes(9)), "1 bytes that belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, attack):
    content, message = HOSTILE[attack]
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_huge_declared_header_takes_no_memory(tmp_path):
    path = tmp_path / WEIGHTS
    path.write_bytes((MAX_HEADER_BYTES - 1).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="declares a header"):
        read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)
counts = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "U8", "F4", "F6_E2M3", "C64", "X"]),
        "shape": st.lists(st.integers(0, 4) | counts, max_size=3),
        "data_offsets": st.lists(counts, min_size=1, max_size=3),
    }
)
headers = st.dictionaries(
    st.text(max_size=4) | st.just("__metadata__"), entries | json_values, max_size=4
)  # fmt: skip


@st.composite
def consistent_files(draw: st.DrawFn) -> bytes:
    """Files whose offsets are laid end to end, then perhaps changed in one place: near the border of validity."""
    header, position = {}, 0
    for number in range(draw(st.integers(0, 4))):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + size * torch.Size(shape).numel()
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = bytearray(safetensors_bytes(header, bytes(position)))
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw) + draw(st.sampled_from([b"", b"", b"\0"]))


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_fuzzed(path: Path, content: bytes) -> None:
    """Either the one error, or a header that safetensors reads alike and whose every tensor can be read in bounds."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(header.tensors)
    position = header.data_begin
    for name, tensor in header.tensors.items():
        assert tensor.name == name
        assert tensor.begin == position
        position = tensor.end
        if tensor.dtype in checkpoints.TORCH_DTYPES:
            assert read_stored(path.parent, tensor).shape == tensor.shape
    assert position == len(content) == header.size


@fuzz
@given(content=st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise(tmp_path, content):
    check_fuzzed(tmp_path / WEIGHTS, content)


@fuzz
@given(header=headers, data=st.binary(max_size=40))
def test_random_headers_never_do_more_than_raise(tmp_path, header, data):
    check_fuzzed(tmp_path / WEIGHTS, safetensors_bytes(header, data))


@fuzz
@given(content=consistent_files())
def test_nearly_valid_files_never_do_more_than_raise(tmp_path, content):
    check_fuzzed(tmp_path / WEIGHTS, content)


@fuzz
@given(content=consistent_files())
def test_what_safetensors_refuses_is_refused(tmp_path, content):
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError:
        with pytest.raises(CheckpointError):
            read_header(path)
