"""Reports made by hand: any names, any size, without a registry."""

from datetime import UTC, datetime, timedelta
from typing import Any

from algorithms.methods import method_of
from governance.auditing import Finding, Verification
from governance.report_figures import Control, Figure, FigureTable, Quantity, Stage, StageFigures
from governance.report_protection import MapCell, Overlap, OverlapTable, ProtectedPart, ProtectionMap
from governance.report_records import (
    ApprovalRecord,
    ChoiceRecord,
    EventRecord,
    IdentificationRecord,
    LayerRecord,
    LedgerRecord,
    MeasurementRecord,
    ModelRecord,
    ModuleRecord,
    PatchRecord,
    PromptSetRecord,
    Report,
)
from governance.report_timeline import timeline

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
START = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
_WIDTH = 8192


def made_identification(number: int, dimension: str, method: str, blocks: int = 2, **more: Any) -> IdentificationRecord:
    """An identification with layer gaps and a window (FGSN) or choices of modules (NLSR)."""
    settings = method_of(method).choose("default", {}).model_dump(mode="json")
    fgsn = method == "fgsn"
    modules = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    given: dict[str, Any] = {
        "identification": number,
        "dimension": dimension,
        "patches": (f"patch {number}",),
        "method": method,
        "preset": "default",
        "seed": 7,
        "head": number - 1 or None,
        "settings": settings,
        "settings_digest": f"{number:064x}",
        "state_digest": "5" * 64,
        "artifact": "a" * 64,
        "answers": None,
        "libraries": {"torch": "2.9.0"},
        "prompt_sets": (1,),
        "layers": tuple(
            LayerRecord(block, 0.01 * block - 0.1, block % 3 > 0) for block in range(blocks if fgsn else 0)
        ),
        "benign_overlap_share": 0.25,
        "unreached": (),
        "warnings": (),
        "imported": False,
        "created_at": START,
        "choices": ()
        if fgsn
        else tuple(ChoiceRecord(name, 0.5, rank, 0.25, 0.75, patched=True) for rank, name in enumerate(modules)),
        "reference": "" if fgsn else "extrapolated from aligned and base (mode exact, beta 0.3)",
        "safe_answers": "",
        "ran": {},
    }
    return IdentificationRecord(**given | more)


def made_report(
    names: tuple[str, ...] = ("animals", "weapons"), *, blocks: int = 2, lineage: str = "line", verified: bool = True
) -> Report:
    """A lineage with one patch for each name, the last of them reverted if there are several, and a control."""
    patches = tuple(_patch(number, name, blocks, len(names)) for number, name in enumerate(names, 1))
    finding = Finding("ledger", "event 3", "its hash is not that of its content")
    return Report(
        lineage=lineage,
        state="active",
        state_digest="d" * 64,
        created_at=START,
        generated_at=START + timedelta(days=1),
        head=max((patch.patch for patch in patches if patch.state == "applied"), default=None),
        is_control=False,
        models=tuple(
            ModelRecord(role, f"{lineage} {role}", "checkpoint", "llama", 10**9, 9 * 10**8, role[0] * 64)
            for role in ("subject", "aligned", "base")
        ),
        patches=patches,
        harmfulness=_figures(names, "harmfulness"),
        accuracy=_figures(("task_accuracy",), None) if names else _figures((), None),
        means=_figures((), None),
        protection=_map(tuple(patch.dimension for patch in patches if patch.state == "applied"), blocks),
        directions=(),
        overlaps=OverlapTable(
            names,
            tuple(
                Overlap(number, name, (f"patch {number}",), 100, 40, (40, *([0] * (len(names) - 1))), 3)
                for number, name in enumerate(names, 1)
            ),
        ),
        identifications=tuple(
            made_identification(number, name, "nlsr" if number == 2 else "fgsn", blocks)
            for number, name in enumerate(names, 1)
        ),
        prompt_sets=tuple(
            PromptSetRecord(
                len(names) * place + number, purpose, name, f"data/{purpose}.jsonl", 10, "b" * 64, (("kind", name),)
            )
            for number, name in enumerate(names, 1)
            for place, purpose in enumerate(("harmful", "benign", "heldout"))
        ),
        controls=(),
        measurements=tuple(
            MeasurementRecord(
                START, "subject", "harmfulness", name, None, "own-phrases 1", {"max_new_tokens": 9, "batch_size": 4}
            )
            for name in names
        ),
        ledger=LedgerRecord(
            9,
            "e" * 64,
            9,
            '{"at":"2030","count":9}',
            agrees=True,
            latest=(
                EventRecord(9, "2030-01-02T03:04:05Z", lineage, "patch.applied", f"lineage {lineage}", "", "e" * 64),
            ),
        ),
        timeline=timeline(lineage, patches, ()),
        verification=Verification({"events": 9}, ("file contents",), () if verified else (finding,)),
    )


def _patch(number: int, name: str, blocks: int, patches: int) -> PatchRecord:
    reverted = number == patches > 1
    applied_at = START + timedelta(hours=number)
    return PatchRecord(
        patch=number,
        dimension=name,
        method="nlsr" if number == 2 else "fgsn",
        operation="subspace",
        state="reverted" if reverted else "applied",
        identification=number,
        neurons_selected=100,
        neurons_already_protected=40,
        neurons_modified=60,
        rows_unchanged=1,
        parameters_modified=10**6,
        modified_share=0.001,
        modified_linear_share=0.00111,
        digest_before="1" * 64,
        digest_after="2" * 64,
        artifact="3" * 64,
        actor=f"who did {name}",
        reason=f"because of {name}",
        revert_reason=f"taken back for {name}" if reverted else "",
        failure=None,
        origin=None,
        created_at=applied_at,
        applied_at=applied_at,
        reverted_at=applied_at + timedelta(minutes=30) if reverted else None,
        modules=tuple(
            ModuleRecord(f"model.layers.{block}.{kind}", block, 3, 0, 3 * _WIDTH, 2.0, 2.1, 0.5)
            for block in range(blocks)
            for kind in KINDS
        ),
        approvals=(ApprovalRecord(f"boss of {name}", "approved", f"fine by {name}", applied_at),)
        if number == 1
        else (),
    )


def _figures(names: tuple[str, ...], harm: str | None) -> FigureTable:
    """The subject, and the head after each patch but the last if there are several."""
    quantities = tuple(Quantity(harm, name, "own-phrases 1") if harm else Quantity(name, None, "") for name in names)
    after = Stage("after patch 1", names[0] if names else "", 1, names[0] if names else None, 0.001, False, True)
    rows = (
        StageFigures(
            Stage("subject", "", None, None, None, False, False), (Figure(90.0, 9, 10, 60.0, 98.0),) * len(names)
        ),
        StageFigures(after, (Figure(10.0, 1, 10, 2.0, 40.0),) * len(names)),
    )
    control = Control("chance", (StageFigures(after, (Figure(50.0, 5, 10, 24.0, 76.0),) * len(names)),))
    return FigureTable(quantities, rows if names else (), (control,) if names else (), ("own-phrases 1",), 0, ())


def _map(names: tuple[str, ...], blocks: int) -> ProtectionMap:
    share = 0.5 / max(1, len(names))
    parts = tuple(ProtectedPart(name, int(share * _WIDTH), share) for name in names)
    held = sum(part.neurons for part in parts)
    cells = tuple(MapCell(kind, _WIDTH, held, parts, held // 2) for kind in KINDS)
    count = blocks * len(KINDS)
    return ProtectionMap(
        KINDS, tuple((block, cells) for block in range(blocks)), names, held * count, _WIDTH * count, 0.5
    )
