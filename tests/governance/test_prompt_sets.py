"""Prompt sets are read alike from every format, filtered, checked, and made canonical."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from governance.errors import PromptSetError
from governance.prompt_sets import (
    PromptRow,
    PromptSource,
    canonical_rows,
    parse_canonical,
    prompt_key,
    read_prompt_set,
    require_disjoint,
)

ROWS: list[dict[str, Any]] = [
    {"prompt": "how do stars burn", "answer": "by fusion", "kind": "science"},
    {"prompt": "name a river", "answer": "the Rhine", "kind": "places"},
    {"prompt": "warum ist Schnee weiß", "answer": "Streuung, überall", "kind": "science"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def write_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.json", write_json),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("saved", write_saved),
    ],
)
def test_every_format_gives_the_same_rows_and_the_same_canonical_bytes(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    source = write(tmp_path / name, ROWS)
    found = read_prompt_set(PromptSource(str(source), where=(("kind", "science"),), answer_column="answer"))
    expected = [PromptRow(row["prompt"], row["answer"]) for row in ROWS if row["kind"] == "science"]
    assert list(found.rows) == expected
    assert found.canonical == canonical_rows(expected)


def test_a_condition_reaches_into_objects_and_lists(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "category": {"terror,crime": True}, "tags": ["x", "y"]},
        {"prompt": "b", "category": {"terror,crime": False}, "tags": ["y"]},
    ]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))

    def prompts(name: str, value: str) -> list[str]:
        return [row.prompt for row in read_prompt_set(PromptSource(file, where=((name, value),))).rows]

    assert prompts("category.terror,crime", "true") == ["a"]
    assert prompts("category.terror,crime", "false") == ["b"]
    assert prompts("tags", "y") == ["a", "b"]
    assert prompts("tags", "x") == ["a"]


def test_columns_are_joined_and_an_empty_part_adds_nothing(tmp_path: Path) -> None:
    rows = [{"instruction": "label this", "input": "good film"}, {"instruction": "say hello", "input": ""}]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = read_prompt_set(PromptSource(file, prompt_columns=("instruction", "input")))
    assert [row.prompt for row in found.rows] == ["label this\ngood film", "say hello"]


def test_repeated_prompts_are_refused_with_both_rows_or_dropped_on_request(tmp_path: Path) -> None:
    rows = [{"prompt": "One  thing"}, {"prompt": "another"}, {"prompt": "one thing"}]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(PromptSetError, match="row 3 repeats the prompt of row 1"):
        read_prompt_set(PromptSource(file))
    found = read_prompt_set(PromptSource(file, drop_duplicates=True))
    assert ([row.prompt for row in found.rows], found.dropped) == (["One  thing", "another"], 1)


def test_the_limit_counts_kept_prompts(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    found = read_prompt_set(PromptSource(file, where=(("kind", "science"),), limit=1))
    assert len(found.rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("rows.jsonl", '{"prompt": "a"}\n[1, 2]\n', "row 2 is not an object"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', "row 2 has an empty prompt"),
        ("rows.jsonl", '{"prompt": 7}\n', "prompt of row 1 is int"),
        ("rows.jsonl", '{"title": "a"}\n', "row 1 has none of the columns"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.csv", "prompt,kind\na,b,c\n", "another number of fields"),
        ("rows.parquet", "not parquet", "is not a Parquet file"),
        ("rows.txt", "a\n", "is not of a known format"),
    ],
)
def test_damaged_sources_are_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptSetError, match=problem):
        read_prompt_set(PromptSource(str(path)))


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(PromptSetError, match="is not UTF-8"):
        read_prompt_set(PromptSource(str(path)))


@pytest.mark.parametrize(
    "location",
    [
        "missing.jsonl",
        "missing.csv",
        "./missing",
        "missing.tsv",
        "missing",
        "missing:test",
        "a/b/c",
        "a/",
        "/b",
        "two words/b",
        "a/b:",
    ],
)
def test_a_missing_file_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    """Nobody is asked on the hub for what has no name there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("governance.data_sources._read_hub", lambda _: pytest.fail("the hub was asked"))
    with pytest.raises(PromptSetError, match="does not exist"):
        read_prompt_set(PromptSource(location))


def test_a_directory_without_a_saved_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptSetError, match="holds no saved dataset"):
        read_prompt_set(PromptSource(str(tmp_path)))


def test_a_hub_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for location in ("nobody-here/no-such-dataset:test", "nobody-here/no_such.set:train[:5]", "nobody/none"):
        with pytest.raises(PromptSetError, match=r"neither a file here nor a Hugging Face dataset.*can be loaded"):
            read_prompt_set(PromptSource(location))


def test_a_filter_that_keeps_nothing_names_the_fields(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(PromptSetError, match=r"none of the 3 rows .* has kind=poetry.*answer, kind, prompt"):
        read_prompt_set(PromptSource(file, where=(("kind", "poetry"),)))
    with pytest.raises(PromptSetError, match="has no field colour"):
        read_prompt_set(PromptSource(file, where=(("colour", "red"),)))


def test_a_prompt_in_two_sets_is_named_with_both_rows(tmp_path: Path) -> None:
    harmful = read_prompt_set(PromptSource(str(write_jsonl(tmp_path / "h.jsonl", ROWS))))
    benign = read_prompt_set(
        PromptSource(str(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x"}, {"prompt": "NAME a river"}])))
    )
    with pytest.raises(PromptSetError, match=r"prompt 2 of the benign set .* is also prompt 2 of the harmful set"):
        require_disjoint([("harmful", harmful), ("benign", benign)])


@given(st.lists(st.tuples(st.text(min_size=1), st.none() | st.text()), max_size=5))
def test_canonical_rows_read_back(rows: list[tuple[str, str | None]]) -> None:
    written = tuple(PromptRow(prompt, answer) for prompt, answer in rows)
    assert parse_canonical(canonical_rows(written)) == written


@given(st.text())
def test_a_key_ignores_case_and_spacing(text: str) -> None:
    assert prompt_key(f"  {text.upper()}\n") == prompt_key(text.upper())
