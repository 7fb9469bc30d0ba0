"""The card of a patched model says what the registry holds, and nothing of the registry is read as Markdown."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import main
from governance.card_data import Card, HeadEvent, RecordedDigest, gather_card, write_text
from governance.catalogue import register_model
from governance.errors import InputError, InterruptedPatchError, UnsoundRecordError
from governance.evaluation import Measurement
from governance.markdown_text import escaped, fenced
from governance.model_card import model_card, render
from governance.model_origin import ModelOrigin, read_origin
from governance.report_glance import glance
from governance.workspace import Workspace
from tests.governance.carded import BEFORE, NOW, measure, read_card
from tests.governance.conftest import Scenarios, Trios
from tests.governance.made_reports import made_report
from tests.governance.scenarios import Scenario, build

HOSTILE = "<img src=x onerror=alert(1)> | `code` ![a](http:evil) **b** [c](d) $e$ @f www.g.h"


def cell(found: Measurement) -> str:
    low, high = found.interval_low, found.interval_high
    return f"{found.value:.1f} % ({found.numerator} of {found.n}; {low:.1f} to {high:.1f})"


def run(scenario: Scenario, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])


def made_card(name: str) -> Card:
    """A card without a registry, in which everything that somebody else names is called `name`."""
    report = made_report((name, f"{name} 2"), lineage=name)
    return Card(
        report=report,
        glance=glance(report),
        head=HeadEvent(9, "patch.applied", datetime(2030, 1, 2, tzinfo=UTC), "e" * 64),
        files=(RecordedDigest(f"{name}.safetensors", 7, "tree", "f" * 64),),
        model_files={model.name: () for model in report.models},
        origin=ModelOrigin(None, {"license": "other", "license_name": name, "license_link": name}, name),
    )


def test_the_card_has_the_figures_that_were_measured_on_both_databases(
    workspace: Workspace, trios: Trios, prompts: Path, tmp_path: Path
) -> None:
    scenario = build(workspace, trios(), prompts)
    before = measure(scenario, BEFORE, tmp_path / "task.jsonl")
    patch = scenario.apply("animals")
    scenario.apply("weapons")
    scenario.revert(2)
    now = measure(scenario, NOW, tmp_path / "task.jsonl")
    card = read_card(model_card(workspace, "line"))
    judge = now[0].judge
    assert card.row("animals") == ["animals", "1", cell(before[0]), cell(now[0]), judge]
    assert card.row("task accuracy") == ["task accuracy", cell(before[1]), cell(now[1]), "expected answers"]
    assert card.row("weapons") == ["weapons", "none", "not measured", "not measured", "–"]
    (row,) = card.table("patch")
    assert row[:6] == [
        "1",
        "animals",
        "fgsn, restore",
        "none",
        f"{patch.neurons_modified:,}",
        f"{100 * patch.modified_share:.2f}\u00a0%",
    ]
    assert row[7:] == ["tester", "because of animals"]
    assert "Patch 2 (weapons) was taken back" in card.text
    assert "max new tokens 3" in card.text


@pytest.mark.parametrize("form", ["full", "LoRA", "NLSR", "no patch"])
def test_front_matter_is_what_the_hub_reads(
    form: str, scenarios: Scenarios, trios: Trios, adapter_trios: Trios
) -> None:
    lora = form == "LoRA"
    scenario = scenarios(adapter_trios(on_aligned=True) if lora else trios())
    if form != "no patch":
        scenario.apply("animals", method="nlsr" if form == "NLSR" else "fgsn")
    content = model_card(scenario.workspace, "line", "some-owner/Base-1.5")
    hub = ModelCard(content).data
    assert hub.to_dict() == read_card(content).fields
    assert hub.base_model == "some-owner/Base-1.5"
    assert hub["base_model_relation"] == ("adapter" if lora else "finetune")
    assert hub.library_name == ("peft" if lora else "transformers")
    assert hub.license is None
    assert ("lora" in hub.tags) == lora
    assert ("None is applied." in content) == (form == "no patch")


@pytest.mark.parametrize("form", ["full", "LoRA"])
def test_a_reader_without_the_registry_can_load_and_check_the_weights(
    form: str, scenarios: Scenarios, trios: Trios, adapter_trios: Trios
) -> None:
    lora = form == "LoRA"
    scenario = scenarios(adapter_trios(on_aligned=True) if lora else trios())
    scenario.apply("animals")
    content = model_card(scenario.workspace, "line")
    snippet = next(code for code in read_card(content).code if "import" in code)
    for placeholder in ("path/to/this/model", "path/to/this/adapter"):
        snippet = snippet.replace(placeholder, str(scenario.working))
    names: dict[str, Any] = {}
    exec(snippet.replace("path/to/the/checkpoint", str(scenario.trio.checkpoint)), names)
    assert names["model"](torch.tensor([[1, 2]])).logits.isfinite().all()
    copy = register_model(scenario.workspace, "copy", scenario.working, "subject", "aligned" if lora else None)
    assert f"has to be `{copy.state_digest}`" in content


def test_nothing_that_others_named_is_read_as_markdown_or_html() -> None:
    card = read_card(render(made_card(HOSTILE)))
    kinds = {token.type for token in card.tokens}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "s_open"}
    assert card.row("1")[1] == HOSTILE
    assert card.row(f"{HOSTILE}.safetensors")[1] == "7"
    assert card.row(HOSTILE)[2] == "90.0 % (9 of 10; 60.0 to 98.0)"
    assert card.fields["license_link"] == HOSTILE
    assert [line for line in card.text.splitlines() if line == HOSTILE][:1] == [HOSTILE], "the title"


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.isprintable).filter(str.strip))
def test_any_name_is_shown_as_it_is(name: str) -> None:
    card = read_card(f"---\na: b\n---\n\nx {escaped(name)} x\n\n| head |\n|---|\n| y{escaped(name)} |\n")
    spaced = " ".join(name.split())
    assert [token.type for token in card.tokens if token.type.endswith(("_open", "_inline", "_block"))] == [
        *("paragraph_open", "table_open", "thead_open", "tr_open", "th_open"),
        *("tbody_open", "tr_open", "td_open"),
    ]
    assert card.table("head") == [[f"y{spaced}"]]
    assert f"x {spaced} x" in card.text


def test_text_that_would_hide_or_turn_the_line_round_is_made_visible() -> None:
    assert escaped("a\u202eb\x00\nc") == "a\ufffdb\ufffd c"
    block = fenced(["echo '```'", "next\nline"], "sh")
    assert block == "````sh\necho '```'\nnext\ufffdline\n````"


def test_a_card_is_written_to_a_new_file_outside_the_working_checkpoint(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    target = tmp_path / "README.md"
    assert run(scenario, "model", "card", "line", "--output", str(target)).exit_code == 0
    assert target.read_text(encoding="utf-8") == run(scenario, "model", "card", "line").stdout
    refused = run(scenario, "model", "card", "line", "--output", str(target))
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert run(scenario, "model", "card", "line", "--output", str(target), "--force").exit_code == 0
    inside = run(scenario, "model", "card", "line", "--output", str(scenario.working / "README.md"), "--force")
    assert inside.exit_code == 2
    assert "working checkpoint" in inside.stderr
    scenario.require_sound()


def test_replacing_a_file_leaves_its_other_name_alone(scenario: Scenario, tmp_path: Path) -> None:
    target, other = tmp_path / "README.md", tmp_path / "other.md"
    other.write_text("kept", encoding="utf-8")
    target.hardlink_to(other)
    write_text(scenario.workspace, "new", target, force=True)
    assert (target.read_text(encoding="utf-8"), other.read_text(encoding="utf-8")) == ("new", "kept")


def test_nothing_is_published_from_a_record_that_does_not_stand(scenario: Scenario) -> None:
    scenario.apply("animals")
    scenario.artifact(1).chmod(0o600)
    scenario.artifact(1).write_bytes(b"other")
    with pytest.raises(UnsoundRecordError, match="audit verify") as refusal:
        model_card(scenario.workspace, "line")
    assert refusal.value.exit_code == 1


@pytest.mark.parametrize("state", ["applying", "reverting"])
def test_nothing_is_published_while_a_patch_is_written(
    state: str, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = made_report(("animals",))
    at_work = replace(report, patches=tuple(replace(patch, state=state) for patch in report.patches))
    monkeypatch.setattr("governance.card_data.gather", lambda *_: at_work)
    with pytest.raises(InterruptedPatchError):
        gather_card(scenario.workspace, "line")


def with_front_matter(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(f"---\n{text}\n---\n# card\n", encoding="utf-8")
    return directory


def test_the_licence_is_the_nearest_that_a_card_states(tmp_path: Path) -> None:
    models = {
        "mine": with_front_matter(tmp_path / "mine", "base_model: owner/aligned"),
        "aligned": with_front_matter(tmp_path / "aligned", "license: other\nlicense_name: own\nlicense_link: LICENSE"),
        "base": with_front_matter(tmp_path / "base", "license: mit"),
    }
    found = read_origin(models, subject="mine", checkpoint=None)
    licence = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert found == ModelOrigin("owner/aligned", licence, "aligned")


@pytest.mark.parametrize(
    "text",
    [
        "license: [mit, gpl]\nbase_model: /home/me/base",
        "license: 'two words'\nbase_model: base",
        "license: {a: b}\nbase_model: [a/b, c/d]",
        "- a list",
        "license: 'open",
        "base_model: ../b/c",
    ],
)
def test_a_card_that_says_nothing_of_use_is_passed_over(text: str, tmp_path: Path) -> None:
    models = {"mine": with_front_matter(tmp_path / "mine", text), "gone": tmp_path / "gone"}
    assert read_origin(models, subject="mine", checkpoint=None) == ModelOrigin(None, {}, None)


def test_the_hub_name_is_that_of_the_cache(tmp_path: Path) -> None:
    place = tmp_path / "models--some-owner--Some-Model.1" / "snapshots" / "abc"
    found = read_origin({"mine": tmp_path, "under": place}, subject="mine", checkpoint="under")
    assert found.base_model == "some-owner/Some-Model.1"


@pytest.mark.parametrize("name", ["", "bare", "a/b/c", "../a", "a/b c", "a/b--c", "a/b\n---", "a/b.."])
def test_what_cannot_name_a_model_on_the_hub_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="OWNER/NAME"):
        read_origin({"mine": tmp_path}, subject="mine", checkpoint=None, given=name)


def test_a_control_says_that_it_is_one() -> None:
    card = made_card("plain")
    content = render(replace(card, report=replace(card.report, is_control=True)))
    assert "A control, not for use" in content
    assert "A control, not for use" not in render(card)
