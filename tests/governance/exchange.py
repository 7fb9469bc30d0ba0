"""Exported patches for tests: written, damaged and forged, and what a refused import must leave alone."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from algorithms.safetensors_files import read_header
from governance.patch_artifact import FORMAT as ARTIFACT
from governance.patch_export import ExportSummary, export_patch
from governance.patch_file import PROVENANCE, PROVENANCE_DIGEST
from governance.patch_import import dry_run_import, import_patch
from governance.tensor_file import TensorFileWriter, TensorSpec, header_bytes
from registry.ledger import canonical
from registry.schema import Identification
from tests.governance.scenarios import Scenario, digests


def export_to(scenario: Scenario, path: Path, sequence: int = 1) -> Path:
    """Export a patch and return the file."""
    assert isinstance(export_patch(scenario.workspace, scenario.name, sequence, path), ExportSummary)
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_of(scenario: Scenario) -> tuple[Any, ...]:
    """Everything that a refused import must leave as it was."""
    with scenario.workspace.registry.read() as session:
        identifications = session.query(Identification).count()
    artifacts = scenario.workspace.store.list(), scenario.workspace.store.leftovers()
    return digests(scenario.working), scenario.states(), scenario.claims(), artifacts, identifications


def require_refused(
    scenario: Scenario, file: Path, error: type[Exception] | tuple[type[Exception], ...], match: str, **options: Any
) -> None:
    """Importing and its dry run refuse the file alike, write nothing, and record the refusal."""
    before = state_of(scenario)
    refusals = []
    for act in (dry_run_import, import_patch):
        with pytest.raises(error, match=match) as refusal:
            act(scenario.workspace, scenario.name, file, **options)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
    assert state_of(scenario) == before
    assert [action for action, _ in scenario.events()][-2:] == ["refused", "refused"]
    assert scenario.events()[-1][1]["attempted"] == "patch.import"


def rewrite(
    source: Path,
    target: Path,
    *,
    metadata: Callable[[dict[str, str]], dict[str, str]] = dict,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
) -> Path:
    """The file with its texts and tensors changed, written as an export writes it."""
    header, tensors = read_header(source), load_file(source)
    change(tensors)
    specs = [TensorSpec(name, held.dtype, tuple(tensors[name].shape)) for name, held in header.tensors.items()]
    with TensorFileWriter(target, specs, metadata(dict(header.metadata or {}))) as writer:
        for name in header.tensors:
            writer.put(name, tensors[name])
    return target


def forge(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Changed rows under a provenance and digests that were all computed anew."""
    rewrite(source, target, change=change)
    header = read_header(target)
    specs = [TensorSpec(name, held.dtype, held.shape) for name, held in header.tensors.items()]
    head = header_bytes(specs, {ARTIFACT: (header.metadata or {})[ARTIFACT]})
    artifact = hashlib.sha256(head + target.read_bytes()[header.data_begin :]).hexdigest()
    target.unlink()
    return rewrite(source, target, metadata=lambda texts: retold(texts, artifact=artifact), change=change)


def retold(texts: Mapping[str, str], **fields: Any) -> dict[str, str]:
    """The texts with fields of the provenance replaced and its digest computed anew."""
    text = canonical(json.loads(texts[PROVENANCE]) | fields).decode()
    return {**texts, PROVENANCE: text, PROVENANCE_DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def first(tensors: Mapping[str, torch.Tensor], what: str) -> torch.Tensor:
    """The first module's rows, old or new."""
    return next(tensor for name, tensor in tensors.items() if name.endswith(f"/{what}"))
