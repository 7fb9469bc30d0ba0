"""The model card of a patched model: a `README.md` with front matter as the Hugging Face hub reads it.

Its figures are the report's. No `model-index` is written: the hub's wants the name of a data set on the hub, and the
registry does not tell one from a local directory of that name.
"""

import shlex
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from governance.card_data import Card, gather_card, limits
from governance.markdown_text import FILTERS, escaped
from governance.report_commands import apply_command
from governance.workspace import Workspace
from neuronledger import __version__

TEMPLATE = "model_card.md.jinja"
_TAGS = ("neuronledger", "safety", "model-editing")


def model_card(workspace: Workspace, lineage: str, base_model: str | None = None) -> str:
    """Return the card of a lineage's working checkpoint.

    Args:
        workspace: the registry.
        lineage: the lineage.
        base_model: the hub's name of the model that it derives from; None: as the models' own cards have it.

    Raises:
        RecordNotFoundError: no lineage of that name.
        UnsoundRecordError: records, ledger or artifacts do not agree.
        InterruptedPatchError: a patch is being written, or was interrupted.
        InputError: `base_model` cannot name a model on the hub.
    """
    return render(gather_card(workspace, lineage, base_model))


def render(card: Card) -> str:
    """Return the text of a card."""
    environment = Environment(
        loader=PackageLoader("governance", "templates"),
        autoescape=True,  # after `escaped`, which leaves nothing to it but what a filter would have missed
        undefined=StrictUndefined,
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    body = environment.get_template(TEMPLATE).render(
        card=card,
        report=card.report,
        glance=card.glance,
        origin=card.origin,
        limits=[Markup(sentence) for sentence in limits(card)],  # noqa: S704  our own words
        version=Markup(__version__),  # noqa: S704
        patch_commands=_patch_commands(card),
        loading=_loading(card),
        checking=_checking(card),
    )
    return f"---\n{ModelCardData(**front_matter(card)).to_yaml()}\n---\n\n{body.strip()}\n"


def front_matter(card: Card) -> dict[str, Any]:
    """The fields of the card's front matter; what is not known is left out."""
    fields: dict[str, Any] = dict(card.origin.licence)
    fields |= {"library_name": "peft" if card.is_adapter else "transformers", "pipeline_tag": "text-generation"}
    if card.origin.base_model:
        relation = "adapter" if card.is_adapter else "finetune"
        fields |= {"base_model": card.origin.base_model, "base_model_relation": relation}
    return fields | {"tags": [*_TAGS, *(["lora"] if card.is_adapter else [])]}


def _patch_commands(card: Card) -> dict[int, str]:
    """By patch, the command that gives its settings: the preset and what differs from it."""
    records = {record.identification: record for record in card.report.identifications}
    return {
        patch.patch: apply_command(card.report.lineage, patch.dimension, records[patch.identification]).line
        for patch in card.report.applied
        if patch.identification in records
    }


def _loading(card: Card) -> tuple[str, ...]:
    if not card.is_adapter:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/model")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")',
        )
    below = repr(card.origin.base_model or "path/to/the/checkpoint").replace("'", '"')
    return (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"checkpoint = AutoModelForCausalLM.from_pretrained({below})",
        'model = PeftModel.from_pretrained(checkpoint, "path/to/this/adapter")',
        f"tokenizer = AutoTokenizer.from_pretrained({below})",
    )


def _checking(card: Card) -> tuple[str, ...]:
    name = card.report.lineage
    return (
        shlex.join(["neuronledger", "audit", "verify", "--weights", "--lineage", name]),
        shlex.join(["neuronledger", "audit", "explain", name]),
        shlex.join(["neuronledger", "audit", "replay", name]),
    )
