"""The bill of materials of a patched model: CycloneDX 1.6, a machine-learning BOM.

The library writes what it has classes for; `bom_model_card` adds the rest to its JSON, and the whole is held against
the schema that the library carries. Nothing reads the clock: time and serial number are those of the head, so that the
same state gives the same bytes.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from governance.bom_model_card import data_json, model_card_json
from governance.card_data import Card, RecordedDigest, gather_card
from governance.errors import InputError
from governance.report_records import ModelRecord, PatchRecord, PromptSetRecord
from governance.workspace import Workspace
from neuronledger import __version__

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, Patch

LIBRARIES = ("cyclonedx", "jsonschema")
_NAMESPACE = uuid5(NAMESPACE_URL, "urn:neuronledger:bill-of-materials")
"""Of the serial numbers, each of which is made from the state digest and the hash of the event that made it."""

_PATCHED = "patched-model"
_UNDER = "base of "
_ORDER = ("$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata", "components", "dependencies")


def bill_of_materials(workspace: Workspace, lineage: str) -> str:
    """Return the bill of materials of a lineage's working checkpoint as JSON, validated.

    Raises:
        RecordNotFoundError: no lineage of that name.
        UnsoundRecordError: records, ledger or artifacts do not agree.
        InterruptedPatchError: a patch is being written, or was interrupted.
        InputError: the extra `cards` is not installed, or a record has no form in the schema.
    """
    require_library()
    return bom_text(gather_card(workspace, lineage))


def require_library() -> None:
    """Check that what writes and validates a bill of materials is installed.

    Raises:
        InputError: it is not.
    """
    for name in LIBRARIES:
        if find_spec(name) is None:
            raise InputError(
                f"a bill of materials needs {name}, which is not installed", "run pip install 'neuronledger[cards]'"
            )


def bom_text(card: Card) -> str:
    """Return the bill of materials of a patched model as JSON, validated.

    Raises:
        InputError: a record has no form in the schema.
    """
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    written = make_outputter(_bom(card), OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    content: dict[str, Any] = json.loads(written)
    sets = {_prompt_set_reference(record): record for record in card.report.prompt_sets}
    content["metadata"]["component"]["modelCard"] = model_card_json(card, sets)
    for component in content.get("components", ()):
        if component["bom-ref"] in sets:
            component["data"] = data_json(sets[component["bom-ref"]])
    content = {name: content[name] for name in _ORDER if name in content} | content
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if (problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        first = str(problem).strip().splitlines()[0]
        raise InputError(
            f"the record of {card.report.lineage} has no form in CycloneDX 1.6: {first[:300]}",
            "report it with this message",
        )
    return text


def _bom(card: Card) -> "Bom":
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository

    report = card.report
    tool = Component(name="neuronledger", version=__version__, type=ComponentType.APPLICATION, bom_ref="neuronledger")
    patched = _patched(card)
    models = {model.name: _model(card, model) for model in report.models}
    bom = Bom(
        components=[*models.values(), *(_prompt_set(record) for record in report.prompt_sets)],
        serial_number=uuid5(_NAMESPACE, f"{report.state_digest} {card.head.hash}"),
        version=1 + len(report.measurements) + len(report.identifications),
        metadata=BomMetaData(timestamp=card.head.at, component=patched, tools=ToolRepository(components=[tool])),
    )
    bom.register_dependency(patched, models.values())  # its weights were worked out from all of them
    for role, name in ((model.role, model.name) for model in report.models):
        if role.startswith(_UNDER):
            bom.register_dependency(models[role.removeprefix(_UNDER)], [models[name]])
    return bom


def _patched(card: Card) -> "Component":
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    report = card.report
    subject = report.subject
    ancestor = Component(
        name=subject.name,
        version=subject.state_digest,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"ancestor:{subject.state_digest}",
        properties=_properties({"role": "subject"}),
    )
    facts = {
        "lineage": report.lineage,
        "kind": subject.kind,
        "parameters": subject.parameters,
        "parameters-modified": sum(patch.parameters_modified for patch in report.applied),
        "state-digest": report.state_digest,
        "head:patch": report.head,
        "head:event": card.head.sequence,
        "head:event-hash": card.head.hash,
        "control": "random neurons" if report.is_control else None,
    }
    for patch in report.applied:
        facts |= {f"patch:{patch.patch}:{name}": value for name, value in _patch_facts(card, patch).items()}
    return Component(
        name=report.lineage,
        version=report.state_digest,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_PATCHED,
        components=_files(_PATCHED, card.files),
        pedigree=Pedigree(
            ancestors=[ancestor],
            patches=[_pedigree_patch(patch) for patch in report.applied],
            notes="; ".join(f"patch {patch.patch} ({patch.dimension}) was taken back" for patch in card.taken_back)
            or None,
        ),
        properties=_properties(facts),
    )


def _patch_facts(card: Card, patch: PatchRecord) -> dict[str, Any]:
    record = next((one for one in card.report.identifications if one.identification == patch.identification), None)
    return {
        "dimension": patch.dimension,
        "method": patch.method,
        "operation": patch.operation,
        "preset": record.preset if record else None,
        "seed": record.seed if record else None,
        "settings": json.dumps(record.settings, sort_keys=True, ensure_ascii=False) if record else None,
        "settings-digest": record.settings_digest if record else None,
        "reference": record.reference or None if record else None,
        "neurons-modified": patch.neurons_modified,
        "parameters-modified": patch.parameters_modified,
        "applied-at": patch.applied_at.isoformat() if patch.applied_at else None,
        "applied-by": patch.actor,
        "reason": patch.reason or None,
        "artifact-sha256": patch.artifact,
        "digest-before": patch.digest_before,
        "digest-after": patch.digest_after,
        "imported-from": f"patch {patch.origin.patch} of {patch.origin.lineage}" if patch.origin else None,
    }


def _pedigree_patch(patch: PatchRecord) -> "Patch":
    from cyclonedx.model.component import Patch, PatchClassification
    from cyclonedx.model.issue import IssueClassification, IssueType

    issue = IssueType(
        type=IssueClassification.SECURITY,
        id=f"patch {patch.patch}",
        name=patch.dimension,
        description=patch.reason or None,
    )
    return Patch(type=PatchClassification.UNOFFICIAL, resolves=[issue])


def _model(card: Card, model: ModelRecord) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    roles = [one.role for one in card.report.models if one.name == model.name]
    reference = f"model:{model.name}"
    facts = {
        "role": ", ".join(roles),
        "kind": model.kind,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "state-digest": model.state_digest,
    }
    return Component(
        name=model.name,
        version=model.state_digest,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference,
        components=_files(reference, card.model_files[model.name]),
        properties=_properties(facts),
    )


def _prompt_set(record: PromptSetRecord) -> "Component":
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    facts = {
        "purpose": record.purpose,
        "dimension": record.dimension,
        "source": record.source,
        "rows": record.rows,
        "where": "; ".join(f"{name}={value}" for name, value in record.where) or None,
    }
    return Component(
        name=f"{record.dimension or 'other'} {record.purpose} prompts",
        version=record.digest,
        type=ComponentType.DATA,
        bom_ref=_prompt_set_reference(record),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=record.digest)],
        properties=_properties(facts),
    )


def _prompt_set_reference(record: PromptSetRecord) -> str:
    return f"prompt-set:{record.identifier}"


def _files(reference: str, files: Iterable[RecordedDigest]) -> "list[Component]":
    """Files of a model; a digest that CycloneDX has no name for is a property."""
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=file.file,
            type=ComponentType.FILE,
            bom_ref=f"{reference}/{file.file}",
            hashes=_hashes(file),
            properties=_properties(
                {"bytes": file.size, f"digest:{file.algorithm}": None if _hashes(file) else file.digest}
            ),
        )
        for file in files
    ]


def _hashes(file: RecordedDigest) -> "list[HashType]":
    from cyclonedx.model import HashAlgorithm, HashType

    known = {"sha256": HashAlgorithm.SHA_256, "blake3": HashAlgorithm.BLAKE3}
    return [HashType(alg=known[file.algorithm], content=file.digest)] if file.algorithm in known else []


def _properties(facts: dict[str, Any]) -> "list[Property]":
    from cyclonedx.model import Property

    return [
        Property(name=f"neuronledger:{name}", value=str(value)) for name, value in facts.items() if value is not None
    ]
