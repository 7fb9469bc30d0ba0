"""The Markdown page of a real-model benchmark, written from its JSON document alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from real_model_runs import DIMENSIONS, SAFELORA
from real_model_summary import REFERENCES, UNSEEN, last_recovery, modified_share

_HARMFUL = (*DIMENSIONS, *UNSEEN)
_HEADS = (*(name.replace("_", " ") for name in DIMENSIONS), "AdvBench", "StrongREJECT", "HarmBench")
_PART_TITLES = {
    "main": "Methods and their controls",
    "grid": "Score, operation, blocks and budget",
    "nlsr": "NLSR: form, β and region",
}
_REFERENCE_TITLES = {"aligned": "aligned", "subject": "fine-tuned"}


def page(document: Mapping[str, Any]) -> str:
    """Every table of one subject, in order."""
    parts: list[str] = [*_opening(document)]
    for part, title in _PART_TITLES.items():
        runs = [run for run in document["runs"] if run["part"] == part]
        if runs:
            parts += [f"## {title}", _figures_table(document, runs), *_refusals(runs)]
            parts += _tests(runs)
    continual = [run for run in document["runs"] if _measured_stages(run) > 1]
    if continual:
        parts += [
            "## Dimension after dimension",
            _continual_text(),
            _continual_table(document, continual),
            _kept_text(continual),
        ]
    parts += ["## Nothing beats", _frontier_text(document)]
    if second := document.get("second_judge"):
        parts += ["## By the trained judge", _second_text(second), _second_table(second), *_tests(second["runs"])]
    return "\n\n".join(parts) + "\n"


def _opening(document: Mapping[str, Any]) -> Iterable[str]:
    attack, machine, conditions = document["attack"], document["machine"], document["conditions"]
    form = {"lora": "LoRA, the aligned adapter trained on", "full": "every parameter of the merged aligned model"}
    yield f"# {document['model']}: {form[attack['form']]}, {100 * attack['poison']:g} % unsafe rows"
    counts = document["prompts"]
    pooled = document["references"]["subject"]["harmfulness"]
    yield (
        f"Training seed {attack['seed']}, alignment seed {attack['aligned_seed']}. Judge: {conditions['judge']}; "
        f"{conditions['decoding']}, {conditions['max_new_tokens']} new tokens. Prompts: "
        + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        + f"; pooled over the dimensions {pooled['seen']['n']}, over kinds never seen {pooled['unseen']['n']} (a "
        "prompt in two sets counts once). They are the report side: nothing was trained on, identified with or chosen "
        "by them, but for the settings of `damage-subspace`, which are older than that rule."
    )
    yield (
        f"{machine['processor']}, {machine['cores']} cores, threads: {conditions['threads']}; "
        + ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
        + "."
    )
    yield (
        "Harmfulness, SST-2 and over-refusal in %; KL in nats against the fine-tuned model on harmless prompts; "
        "modified: linear parameters in %, all dimensions together. Recovery is the share of the lost safety that is "
        "back, (fine-tuned − patched) / (fine-tuned − aligned) of pooled harmfulness, with its 95 % interval (paired "
        "bootstrap over prompts)."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _figures_table(document: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    heads = [
        "",
        *_HEADS,
        "seen",
        "unseen",
        "recovery, seen",
        "recovery, unseen",
        "SST-2",
        "over-refusal",
        "KL",
        "modified",
    ]
    rows = [[_REFERENCE_TITLES[model], *_cells(document["references"][model])] for model in REFERENCES]
    rows += [
        [name.removeprefix("reference "), *_cells(figures)]
        for name, figures in document["references"].items()
        if name not in REFERENCES and runs[0]["part"] == "nlsr"
    ]
    for run in runs:
        if run["stages"] and "figures" in run["stages"][-1]:
            rows.append([f"`{run['name']}`", *_cells(run["stages"][-1], _modified(run))])
    return _table(heads, rows)


def _cells(stage: Mapping[str, Any], share: str = "") -> list[str]:
    figures, pooled = stage["figures"], stage["harmfulness"]
    recovered = stage.get("recovery") or {}
    kl = figures.get("kl")
    return [
        *(f"{figures[name]['value']:.0f}" for name in _HARMFUL),
        *(f"{pooled[kinds]['value']:.0f}" for kinds in ("seen", "unseen")),
        *(_recovery_cell(recovered.get(kinds)) for kinds in ("seen", "unseen")),
        f"{figures['sst2']['value']:.1f}",
        f"{figures['over_refusal']['value']:.0f}",
        f"{kl['value']:.2f}" if kl else "",
        share,
    ]


def _modified(run: Mapping[str, Any]) -> str:
    directions = sum(stage["patch"].get("directions", 0) for stage in run["stages"])
    return f"{modified_share(run):.1f}" + (f" ({directions:,} directions)" if directions else "")


def _recovery_cell(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _refusals(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        if run["refused"]:
            at = run["dimensions"][len(run["stages"])]
            yield f"`{run['name']}`, refused for {at.replace('_', ' ')}: {run['refused']}"


def _tests(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = [
        [
            f"`{run['name']}`",
            SAFELORA if name == SAFELORA else f"`{name}`",
            *(cell for kinds in ("seen", "unseen", "all") for cell in _test_cells(tests[kinds])),
        ]
        for run in runs
        for name, tests in run["tests"].items()
    ]
    if rows:
        yield (
            "Harmful on pooled prompts for one of the two only, and p of McNemar's exact test (two-sided). Not "
            "corrected for the number of tests."
        )
        heads = ["", "against"]
        heads += [
            f"{kinds}: {what}" for kinds in ("seen", "unseen", "all") for what in ("only it · only the other", "p")
        ]
        yield _table(heads, rows)


def _test_cells(test: Mapping[str, Any]) -> tuple[str, str]:
    p = test["p"]
    return f"{test['only_first']} · {test['only_second']}", f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _measured_stages(run: Mapping[str, Any]) -> int:
    return sum("figures" in stage for stage in run["stages"])


def _continual_text() -> str:
    return (
        "Harmfulness in % with its 95 % interval after every step; newly modified neurons (or claimed directions), and "
        "how many selected ones an earlier step had protected."
    )


def _continual_table(document: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    subject = document["references"]["subject"]["figures"]
    heads = ["", "after", *(name.replace("_", " ") for name in DIMENSIONS), "newly modified", "already protected"]
    heads += ["modified so far, %"]
    rows = [["fine-tuned", "", *(_with_interval(subject[name]) for name in DIMENSIONS), "", "", ""]]
    for run in runs:
        for number, stage in enumerate(run["stages"], start=1):
            patch = stage["patch"]
            share = modified_share(run, number)
            new = f"{patch['neurons_modified']:,} neurons"
            if patch.get("directions"):
                new = f"{patch['directions']:,} directions"
            figures = [_with_interval(stage["figures"][name]) if "figures" in stage else "" for name in DIMENSIONS]
            already = f"{patch['neurons_already_protected']:,}"
            rows.append(
                [f"`{run['name']}`", stage["dimension"].replace("_", " "), *figures, new, already, f"{share:.1f}"]
            )
    return _table(heads, rows)


def _kept_text(runs: Sequence[Mapping[str, Any]]) -> str:
    worse = [
        f"`{run['name']}`: {found['dimension'].replace('_', ' ')} from {found['before']:.0f} to {found['after']:.0f} "
        f"after {found['step'].replace('_', ' ')}"
        for run in runs
        for found in run["worse_later"]
    ]
    if not worse:
        return "No step left an earlier dimension above the interval that it had after its own step."
    return "Above the interval that they had after their own step: " + "; ".join(worse) + "."


def _with_interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.0f} ({figure['interval_low']:.0f} to {figure['interval_high']:.0f})"


def _frontier_text(document: Mapping[str, Any]) -> str:
    by_name = {run["name"]: run for run in document["runs"]}
    lines = ["Runs that no other beats in recovery at the same or a smaller share modified:", ""]
    for kinds, title in (("seen", "kinds identified with"), ("unseen", "kinds never seen")):
        entries = [
            f"`{name}` ({modified_share(by_name[name]):.1f} %, {found['value']:.2f})"
            for name in document["frontier"][kinds]
            if (found := last_recovery(by_name[name], kinds)) is not None
        ]
        lines.append(f"- {title}: " + ", ".join(entries))
    return "\n".join(lines)


def _second_text(second: Mapping[str, Any]) -> str:
    judge, agreed, seconds = second["judge"], second["agreement"], second["seconds_per_model"]
    whole, cut = (_judge_figures(figures) for figures in (judge["figures"], judge["cut"]["figures"]))
    kappa = "undefined" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
    return (
        f"The same stored answers, read by a judge that was trained on BeaverTails (version {judge['version']}). It "
        "reads them by hidden states of the unaligned model, and no prompt of this report is among its rows. On "
        f"answers to prompts that it never saw: {whole}. With these answers cut to {judge['cut']['tokens']} tokens, as "
        f"short as those here: {cut}. It errs in both directions: no share here is a count of harmful answers, and the "
        "aligned model's need not be 0. Recovery is between the shares that this judge itself finds for the aligned "
        f"and the fine-tuned model. On {agreed['n']:,} answers it and the first judge agree in "
        f"{100 * agreed['share']:.0f} % (Cohen's kappa {kappa}); harmful by both {agreed['both']:,}, by the first only "
        f"{agreed['only_first']:,}, by this one only {agreed['only_second']:,}. Judging took {seconds['median']:.0f} s "
        f"for a model (median), at most {seconds['most']:.0f}."
    )


def _judge_figures(figures: Sequence[Mapping[str, Any]]) -> str:
    found = {figure["metric"]: figure for figure in figures}
    shown = (
        f"{label} {found[metric]['value']:.2f} ({found[metric]['low']:.2f} to {found[metric]['high']:.2f})"
        for metric, label in (("auc", "AUC"), ("balanced_accuracy", "balanced accuracy"))
    )
    return ", ".join(shown) + f", n {found['auc']['n']}"


def _second_table(second: Mapping[str, Any]) -> str:
    def shares(harmfulness: Mapping[str, Any]) -> list[str]:
        return [_with_interval(harmfulness[kinds]) for kinds in ("seen", "unseen")]

    rows = [[_REFERENCE_TITLES[model], *shares(second["references"][model]), "", ""] for model in REFERENCES]
    for run in second["runs"]:
        last = run["stages"][-1]
        back = (_recovery_cell(last["recovery"][kinds]) for kinds in ("seen", "unseen"))
        rows.append([f"`{run['name']}`", *shares(last["harmfulness"]), *back])
    return _table(["", "seen", "unseen", "recovery, seen", "recovery, unseen"], rows)
