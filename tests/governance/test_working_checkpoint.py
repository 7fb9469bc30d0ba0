"""A working checkpoint is the subject's files, shares none that a patch can reach, and is there whole or not at all."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms import parallel
from algorithms.digests import digest_weight_file
from algorithms.errors import CheckpointError
from governance import catalogue, lineages
from governance.catalogue import register_model
from governance.errors import InputError, SpaceError, WeightsChangedError
from governance.hashing import HashJournal, hash_files
from governance.lineages import LineageSummary, create_lineage
from governance.recovery import recover
from governance.workspace import Workspace
from registry import queries
from registry.database import Registry
from registry.processes import Owner, this_process
from tests.governance.conftest import Trios
from tests.governance.faults import Fault, killed
from tests.governance.scenarios import Trio, digests
from tests.tiny_models import save_model, save_variant

EMBEDDINGS = "model-00001-of-00002.safetensors"
BLOCKS = "model-00002-of-00002.safetensors"


@pytest.fixture
def apart(tmp_path: Path) -> Trio:
    """Models whose embeddings and norms lie in a shard of their own."""
    base = save_model(tmp_path / "base")
    subject, aligned = (
        save_variant(base, tmp_path / name, seed=seed) for seed, name in enumerate(("tuned", "aligned"))
    )
    for path in (base, subject, aligned):
        _split(path)
    return Trio(subject=subject, aligned=aligned, base=base)


def _split(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    in_blocks = {name for name in tensors if "proj" in name}
    for file, chosen in ((EMBEDDINGS, tensors.keys() - in_blocks), (BLOCKS, in_blocks)):
        save_file({name: tensors[name] for name in sorted(chosen)}, path / file, {"format": "pt", "made": "by hand"})
    weight_map = {name: BLOCKS if name in in_blocks else EMBEDDINGS for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _create(workspace: Workspace, trio: Trio, name: str = "line", working: Path | None = None) -> LineageSummary:
    for role in ("base", "aligned", "subject"):
        if not any(model.name == role for model in catalogue.list_models(workspace)):
            register_model(workspace, role, getattr(trio, role), role)  # type: ignore[arg-type]
    return create_lineage(workspace, name, subject="subject", aligned="aligned", base="base", working=working)


def test_a_file_without_rows_to_patch_is_linked_and_all_others_are_apart(workspace: Workspace, apart: Trio) -> None:
    working = Path(_create(workspace, apart).working_path)
    assert digests(working) == digests(apart.subject)
    for path in apart.subject.iterdir():
        assert path.samefile(working / path.name) == (path.name == EMBEDDINGS)


def test_a_cache_of_symbolic_links_is_copied(workspace: Workspace, apart: Trio, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(apart.subject.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    working = Path(_create(workspace, apart).working_path)
    assert digests(working) == digests(blobs)
    for path in working.iterdir():
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1


def test_modes_and_every_other_file_are_kept(workspace: Workspace, apart: Trio) -> None:
    (apart.subject / "notes").mkdir()
    (apart.subject / "notes" / "card.md").write_text("a card")
    (apart.subject / BLOCKS).chmod(0o440)
    (apart.subject / "config.json").chmod(0o755)
    working = Path(_create(workspace, apart).working_path)
    assert (working / "notes" / "card.md").read_text() == "a card"
    assert stat.S_IMODE((working / "config.json").stat().st_mode) == 0o755
    assert stat.S_IMODE((working / BLOCKS).stat().st_mode) == 0o640  # the owner has to be able to write


def test_what_a_killed_creation_left_gives_way(workspace: Workspace, trios: Trios) -> None:
    """A kill between the renaming and the record leaves a directory that no lineage owns."""
    left = workspace.directory / "lineages" / "line"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    working = Path(_create(workspace, trios()).working_path)
    assert working == left
    assert digests(working) == digests(trios().subject)


@pytest.fixture
def url(apart: Trio, tmp_path: Path) -> str:
    """A registry that holds the models and to which no connection is open."""
    url = f"sqlite:///{tmp_path / 'registry' / 'registry.db'}"
    with Registry.open(url, create=True) as registry:
        for role in ("base", "aligned", "subject"):
            register_model(Workspace(registry, "tester"), role, getattr(apart, role), role)  # type: ignore[arg-type]
    return url


def _created(url: str, apart: Trio, working: Path | None = None) -> LineageSummary:
    with Registry.open(url) as registry:
        return _create(Workspace(registry, "tester"), apart, working=working)


@pytest.mark.parametrize("command", ["recover", "lineage create"])
def test_the_copy_that_a_killed_creation_left_is_removed(url: str, apart: Trio, tmp_path: Path, command: str) -> None:
    places = tmp_path / "registry" / "lineages"
    assert killed(Fault(places, "fsync", 3, "kill"), lambda: _created(url, apart))
    assert len(list(places.iterdir())) == 1
    if command == "recover":
        with Registry.open(url) as registry:
            recover(Workspace(registry, "tester"))
        assert list(places.iterdir()) == []
    else:
        _created(url, apart)
        assert list(places.iterdir()) == [places / "line"]


def test_the_next_creation_beside_a_chosen_place_removes_what_a_killed_one_left_there(
    url: str, apart: Trio, tmp_path: Path
) -> None:
    chosen = tmp_path / "chosen" / "place"
    assert killed(Fault(chosen.parent, "fsync", 3, "kill"), lambda: _created(url, apart, chosen))
    assert len(list(chosen.parent.iterdir())) == 1
    _created(url, apart, chosen.with_name("another"))
    assert list(chosen.parent.iterdir()) == [chosen.with_name("another")]


def test_a_copy_that_somebody_may_still_make_is_left(workspace: Workspace, trios: Trios) -> None:
    mine = this_process()
    owners = (mine, Owner("another.host+-+-+-", 7, 1), Owner(mine.host, 2**22 + 1, 1))
    places = workspace.directory / "lineages"
    left = {places / f".{name}.0f0f.making" for name in (*(owner.name for owner in owners), "line")}
    for path in left:
        path.mkdir(parents=True)
    _create(workspace, trios())
    recover(workspace)
    assert set(places.iterdir()) == {places / "line", *left}


@pytest.mark.parametrize("working", [None, "outer/inner/line"])
def test_a_power_cut_after_the_record_takes_no_directory(
    url: str, apart: Trio, tmp_path: Path, working: str | None
) -> None:
    chosen = tmp_path / working if working else None
    assert killed(Fault(tmp_path, "committed", 1, "power cut"), lambda: _created(url, apart, chosen))
    with Registry.open(url) as registry:
        (line,) = lineages.list_lineages(Workspace(registry, "tester"))
    assert digests(Path(line.working_path)) == digests(apart.subject)


@pytest.mark.parametrize("part", [".", "..", "deep/inside"])
def test_the_checkpoint_of_another_lineage_never_gives_way(
    workspace: Workspace, trios: Trios, tmp_path: Path, part: str
) -> None:
    first = Path(_create(workspace, trios(), working=tmp_path / "outer" / "inner").working_path)
    before = digests(first)
    with pytest.raises(InputError, match=f"{first} of lineage line .* --working"):
        _create(workspace, trios(), "other", working=first / part)
    assert digests(first) == before
    assert not (first / "deep").exists()


def test_a_checkpoint_in_the_default_place_of_another_lineage_never_gives_way(
    workspace: Workspace, trios: Trios
) -> None:
    """What lies in a default place is removed, if no lineage owns it."""
    inside = workspace.directory / "lineages" / "other" / "v2"
    _create(workspace, trios(), working=inside)
    before = digests(inside)
    with pytest.raises(InputError, match=f"{inside} of lineage line"):
        _create(workspace, trios(), "other")
    assert digests(inside) == before


def test_a_place_that_is_taken_during_the_copy_does_not_give_way(
    workspace: Workspace, trios: Trios, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = lineages._followed

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(lineages, "_followed", followed)
        _create(workspace, trios(), "overtaking", working=workspace.directory / "lineages" / "line" / "v2")
        return followed(*arguments)

    monkeypatch.setattr(lineages, "_followed", overtaken)
    with pytest.raises(InputError, match="of lineage overtaking"):
        _create(workspace, trios())
    assert digests(workspace.directory / "lineages" / "line" / "v2") == digests(trios().subject)


@pytest.mark.parametrize("part", [".", "..", "inside"])
def test_a_checkpoint_and_a_model_are_apart(workspace: Workspace, apart: Trio, part: str) -> None:
    before = {path: digests(path) for path in (apart.subject, apart.aligned, apart.base)}
    with pytest.raises(InputError, match=f"{apart.subject.parent}/.* of model .* --working"):
        _create(workspace, apart, working=apart.subject / part)
    assert {path: digests(path) for path in before} == before


def test_a_place_is_taken_under_each_of_its_names(workspace: Workspace, trios: Trios, tmp_path: Path) -> None:
    first = Path(_create(workspace, trios(), working=tmp_path / "first").working_path)
    first.rename(tmp_path / "moved")
    first.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="of lineage line"):
        _create(workspace, trios(), "other", working=tmp_path / "moved" / "inside")


def test_a_registry_may_lie_in_a_model(apart: Trio) -> None:
    with Registry.open(f"sqlite:///{apart.subject / '.neuronledger' / 'registry.db'}", create=True) as registry:
        workspace = Workspace(registry=registry, actor="tester")
        assert Path(_create(workspace, apart).working_path).is_relative_to(apart.subject)


def test_a_chosen_directory_with_content_is_refused(workspace: Workspace, trios: Trios, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SpaceError, match="exists and is not empty"):
        _create(workspace, trios(), working=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_creation_that_fails_leaves_no_half_checkpoint(
    workspace: Workspace, trios: Trios, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lineages, "move_into_place", failing)
        with pytest.raises(KeyboardInterrupt):
            _create(workspace, trios())
    assert list((workspace.directory / "lineages").iterdir()) == []
    assert _create(workspace, trios()).head is None


def test_a_subject_whose_size_and_times_hide_a_change_is_found_in_its_copy(workspace: Workspace, apart: Trio) -> None:
    register_model(workspace, "subject", apart.subject, "subject")
    before = (apart.subject / BLOCKS).stat()
    with (apart.subject / BLOCKS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(apart.subject / BLOCKS, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(WeightsChangedError, match=f"{BLOCKS} of the subject .* has another SHA-256"):
        _create(workspace, apart)
    assert list((workspace.directory / "lineages").iterdir()) == []
    assert not lineages.list_lineages(workspace)


def test_a_file_of_a_directory_inside_is_copied_and_does_not_stand_for_one_outside(
    workspace: Workspace, apart: Trio
) -> None:
    for directory in ("a", "original"):
        (apart.subject / directory).mkdir()
        (apart.subject / directory / BLOCKS).write_bytes(b"weights in another form")
    (apart.subject / "extra.safetensors").write_bytes(b"not of the model")
    working = Path(_create(workspace, apart).working_path)
    assert (working / "original" / BLOCKS).read_bytes() == b"weights in another form"
    with workspace.registry.read() as session:
        followed = {file.file: file.digest_algorithm for file in queries.get_lineage(session, "line").files}
    assert followed == {EMBEDDINGS: "tree", BLOCKS: "tree", "extra.safetensors": "sha256"}


# --- hashing that goes on where it stopped ---


def test_hashing_goes_on_where_it_was_interrupted(apart: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = HashJournal.of(tmp_path, apart.subject)
    whole = hash_files(apart.subject, [EMBEDDINGS, BLOCKS], ())
    hash_files(apart.subject, [EMBEDDINGS], (), journal=journal)
    with journal.path.open("a") as file:
        file.write('{"key": ["half a li')
    hashed: list[str] = []

    def counted(path: Path, *arguments: object) -> object:
        hashed.append(path.name)
        return digest_weight_file(path, ())

    monkeypatch.setattr("governance.hashing.digest_weight_file", counted)
    assert hash_files(apart.subject, [EMBEDDINGS, BLOCKS], (), journal=journal) == whole
    assert hashed == [BLOCKS]


def test_a_file_that_changed_is_hashed_again(apart: Trio, tmp_path: Path) -> None:
    journal = HashJournal.of(tmp_path, apart.subject)
    path = apart.subject / BLOCKS
    before = hash_files(apart.subject, [BLOCKS], (), journal=journal)
    times = path.stat()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt", "made": "by hand"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = hash_files(apart.subject, [BLOCKS], (), journal=journal)
    assert after[BLOCKS].sha256 != before[BLOCKS].sha256
    assert after == hash_files(apart.subject, [BLOCKS], ())


@pytest.mark.parametrize("threads", [1, 8])
def test_of_several_files_that_cannot_be_read_the_first_is_named(
    apart: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(parallel, "THREADS", threads)
    journal = HashJournal.of(tmp_path, apart.subject)
    with pytest.raises(CheckpointError, match="/b cannot be read"):
        hash_files(apart.subject, [EMBEDDINGS, "b", "a", BLOCKS], (), journal=journal)
    assert journal.find(apart.subject / EMBEDDINGS) is not None


def test_a_registered_model_leaves_no_journal(workspace: Workspace, apart: Trio) -> None:
    register_model(workspace, "base", apart.base, "base")
    assert list(workspace.directory.glob("hashing-*")) == []


def test_the_directory_of_a_new_registry_need_not_be_there(apart: Trio, tmp_path: Path) -> None:
    """SQLite's directory is made with its file; PostgreSQL has none until something is kept beside it."""
    journal = HashJournal.of(tmp_path / "not" / "there", apart.subject)
    hash_files(apart.subject, [BLOCKS], (), journal=journal)
    assert journal.find(apart.subject / BLOCKS) is not None
