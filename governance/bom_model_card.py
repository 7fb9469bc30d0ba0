"""The parts of a CycloneDX 1.6 machine-learning BOM that `cyclonedx-python-lib` has no classes for, as JSON.

`modelCard` of the patched model and `data` of a prompt set; the rest is `bill_of_materials`.
"""

import json
from collections.abc import Iterable
from typing import Any

from governance.card_data import Card, limits
from governance.report_figures import Figure
from governance.report_glance import GlanceRow
from governance.report_records import PromptSetRecord
from governance.report_text import rate


def model_card_json(card: Card, prompt_sets: Iterable[str]) -> dict[str, Any]:
    """The `modelCard` object of a patched model.

    Args:
        card: what is said of it.
        prompt_sets: references of the data components that it was identified and measured on.
    """
    glance = card.glance
    considerations = {
        "technicalLimitations": list(limits(card)),
        "performanceTradeoffs": [_tradeoff(row) for row in glance.costs if row.before and row.now],
        "ethicalConsiderations": [_risk(card, row) for row in glance.harmfulness],
    }
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": card.report.subject.architecture,
            "datasets": [{"ref": reference} for reference in prompt_sets],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                _metric(row, stage, figure)
                for row in (*glance.harmfulness, *glance.costs)
                for stage, figure in _stages(card, row)
                if figure is not None
            ]
        },
        "considerations": {name: found for name, found in considerations.items() if found},
        "properties": [
            {"name": "neuronledger:metrics:unit", "value": "percent"},
            {"name": "neuronledger:metrics:interval", "value": "Wilson, 95 %"},
            *(
                {"name": "neuronledger:metrics:generation", "value": way}
                for way in dict.fromkeys((*card.report.harmfulness.generation, *card.report.accuracy.generation))
            ),
        ],
    }


def data_json(record: PromptSetRecord) -> list[dict[str, Any]]:
    """The `data` array of a prompt set's component."""
    return [
        {
            "type": "dataset",
            "name": record.source,
            "description": f"{record.rows} {record.purpose} prompts" + _of_dimension(record.dimension),
        }
    ]


def _of_dimension(dimension: str | None) -> str:
    return f" of the dimension {dimension}" if dimension else ""


def _stages(card: Card, row: GlanceRow) -> tuple[tuple[str, Figure | None], ...]:
    """The figures of a row, each with what was measured."""
    head = card.report.head
    return (
        ("subject, before the patches", row.before),
        (f"this model, after patch {head}" if head else "this model, no patch", row.now),
        (f"control with random neurons, lineage {card.glance.control}", row.control),
    )


def _metric(row: GlanceRow, stage: str, figure: Figure) -> dict[str, Any]:
    """One figure; value and interval have every digit that was recorded."""
    judge = f"judge {row.quantity.judge}" if row.quantity and row.quantity.judge else ""
    counted = f"{figure.numerator} of {figure.n}" if figure.n else ""
    parts = (f"dimension {row.dimension}" if row.dimension else "", stage, counted, judge)
    metric: dict[str, Any] = {
        "type": row.quantity.metric if row.quantity else "",
        "value": json.dumps(figure.value),
        "slice": "; ".join(part for part in parts if part),
    }
    if figure.low is not None and figure.high is not None:
        bounds = {"lowerBound": json.dumps(figure.low), "upperBound": json.dumps(figure.high)}
        metric["confidenceInterval"] = bounds
    return metric


def _tradeoff(row: GlanceRow) -> str:
    before, now = (rate(figure.value) if figure else "" for figure in (row.before, row.now))
    return f"{row.quantity.title if row.quantity else ''}: {before} % before the patches, {now} % now"


def _risk(card: Card, row: GlanceRow) -> dict[str, str]:
    """A dimension, and the patches against it."""
    name = row.dimension or (row.quantity.title if row.quantity else "")
    patches = [patch for patch in card.report.applied if patch.patch in row.patches]
    done = [f"patch {patch.patch} ({patch.method}, {patch.operation})" for patch in patches]
    return {"name": name, "mitigationStrategy": ", ".join(done) or "none: no patch is applied for it"}
