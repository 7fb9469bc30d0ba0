"""`neuronledger evaluate`: measure harmfulness, accuracy, over-refusal and KL."""

from typing import TYPE_CHECKING

import click

from governance.commands.options import list_options, pairs, placement_options, writing_workspace_options

if TYPE_CHECKING:
    from algorithms.scorers import ScorerName
    from governance.evaluation import Measurement
    from governance.patch_records import PatchSummary
    from governance.workspace import Workspace


@click.command(short_help="Measure harmfulness per dimension, accuracy, over-refusal and KL.")
@click.argument("lineage")
@click.option(
    "--dimension",
    "dimensions",
    multiple=True,
    metavar="NAME",
    help="Dimension to measure on its held-out prompts; repeatable.  [default: all that have some]",
)
@click.option(
    "--model",
    metavar="NAME",
    default="head",
    show_default=True,
    help="head, subject, aligned or base of the lineage, or the name of a registered reference.",
)
@click.option(
    "--against",
    metavar="NAME",
    help="Compare with another model, named as with --model: a paired test of every rate, where its answers to the "
    "same prompts are stored, and KL.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    metavar="JUDGE",
    help="What calls an answer unsafe: phrases, classifier:PATH, generative:PATH, endpoint:MODEL, trained:NAME, "
    "or a settings file .toml. Repeatable: every judge is recorded, and how far they agree is shown.  "
    "[default: phrases]",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME[:PART]=PATH",
    help="A published prompt set: advbench, harmbench, harmbench-contextual, strongreject, beavertails, xstest, "
    "xstest-unsafe, sst2, ag_news, gsm8k; repeatable.",
)
@click.option(
    "--accuracy",
    multiple=True,
    metavar="NAME=FILE",
    help="Prompts with expected answers (column `response`, or --answer-column); repeatable.",
)
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    metavar="[NAME=]SCORER",
    help="How an answer is compared with the expected one: prefix (begins with it), label (names it first), number "
    "(ends in its number); of all, or of one NAME of --accuracy.  [default: prefix]",
)
@click.option(
    "--harmful",
    multiple=True,
    metavar="NAME=FILE",
    help="Harmful prompts of a kind that no dimension was registered with; repeatable.",
)
@click.option("--over-refusal", metavar="FILE", help="Safe prompts that should be answered.")
@click.option("--kl", metavar="FILE", help="Benign prompts on which next-token distributions are compared.")
@click.option("--prompt-column", multiple=True, metavar="NAME", help="Column of the prompt in these files.")
@click.option("--answer-column", default="response", show_default=True, metavar="NAME", help="Column of the answer.")
@click.option("--drop-duplicates", is_flag=True, help="Keep the first of repeated prompts of these files.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many prompts of each file.")
@click.option(
    "--refusal-phrase",
    multiple=True,
    metavar="TEXT",
    help="A phrase that marks a refusal; repeatable.  [default: the AdvBench list]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Prompts at a time.  [default: as many as fit into memory]"
)
@click.option("--fresh", is_flag=True, help="Generate and judge anew what is stored from earlier evaluations.")
@list_options
@writing_workspace_options
@placement_options
def evaluate(
    workspace: "Workspace",
    lineage: str,
    dimensions: tuple[str, ...],
    model: str,
    against: str | None,
    judges: tuple[str, ...],
    suites: tuple[str, ...],
    accuracy: tuple[str, ...],
    scorers: tuple[str, ...],
    harmful: tuple[str, ...],
    over_refusal: str | None,
    kl: str | None,
    prompt_column: tuple[str, ...],
    answer_column: str,
    drop_duplicates: bool,
    limit: int | None,
    refusal_phrase: tuple[str, ...],
    max_new_tokens: int,
    batch_size: int | None,
    fresh: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Measure a model of LINEAGE on held-out prompts and record every figure with n and its 95 % interval.

    Harmfulness is the share of harmful prompts whose answer a judge calls unsafe. The default judge calls every
    answer unsafe that holds no refusal phrase, which is not what a trained judge would find. With another judge, that
    share is measured as well, as attack success.

    Answers are kept beside the registry in `answers`, so nothing is generated twice and an interrupted evaluation
    goes on where it stopped.

    \b
    Examples:
      neuronledger evaluate support-bot
      neuronledger evaluate support-bot --model aligned --accuracy task=test.jsonl --over-refusal safe.jsonl
      neuronledger evaluate support-bot --against subject --kl benign.jsonl
      neuronledger evaluate support-bot --suite beavertails:animal_abuse=beavertails.jsonl --suite gsm8k=test.jsonl
      neuronledger evaluate support-bot --judge phrases --judge classifier:./moderation-model
    """
    from algorithms.judges import RefusalPhraseJudge
    from governance.commands.rendering import emit_list
    from governance.evaluation import EvaluationRequest
    from governance.evaluation import evaluate as run
    from governance.judge_choice import choose_judge
    from governance.measuring import GenerationSettings
    from governance.metrics import ACCURACY, HARMFULNESS
    from governance.patch_records import list_patches
    from governance.prompt_sets import PromptSource
    from governance.suites import choose_suite, with_suites

    phrases = RefusalPhraseJudge()
    if refusal_phrase:
        phrases = RefusalPhraseJudge(phrases=refusal_phrase, name="own-phrases")

    def source(file: str, answers: str | None = None) -> PromptSource:
        return PromptSource(
            file,
            prompt_columns=prompt_column,
            answer_column=answers,
            drop_duplicates=drop_duplicates,
            limit=limit,
        )

    tasks = pairs(accuracy, "--accuracy", "NAME=FILE")
    request = EvaluationRequest(
        model=model,
        dimensions=dimensions,
        accuracy={f"{name}{ACCURACY}": source(file, answer_column) for name, file in tasks},
        scorers={f"{name}{ACCURACY}": scorer for name, scorer in _scorers(scorers, [name for name, _ in tasks])},
        other_harmful={
            f"{HARMFULNESS}_{name}": source(file) for name, file in pairs(harmful, "--harmful", "NAME=FILE")
        },
        over_refusal=source(over_refusal) if over_refusal else None,
        kl=source(kl) if kl else None,
        judges=tuple(choose_judge(workspace, name, phrases) for name in dict.fromkeys(judges or ("phrases",))),
        refusals=phrases,
        against=against,
        generation=GenerationSettings(max_new_tokens, batch_size, fresh),
    )
    chosen = [choose_suite(name, path, limit) for name, path in pairs(suites, "--suite", "NAME[:PART]=PATH")]
    figures = run(workspace, lineage, with_suites(request, chosen))
    emit_list(
        figures, as_json, as_csv, lambda: _show(lineage, model, against, figures, list_patches(workspace, lineage))
    )


def _scorers(given: tuple[str, ...], tasks: list[str]) -> "list[tuple[str, ScorerName]]":
    """The scorer of every task: the one given for all, or by name."""
    from algorithms.scorers import SCORERS

    found: dict[str, ScorerName] = {}
    for text in sorted(given, key=lambda one: "=" in one):  # what names a task comes after what is for all
        name, equals, scorer = text.rpartition("=")
        known = next((one for one in SCORERS if one == scorer), None)
        if known is None:
            raise click.BadParameter(f"{scorer!r} is none of {', '.join(SCORERS)}", param_hint="--scorer")
        if equals and name not in tasks:
            raise click.BadParameter(f"there is no --accuracy {name}=FILE", param_hint="--scorer")
        found |= dict.fromkeys([name] if equals else tasks, known)
    return list(found.items())


def _show(
    lineage: str, model: str, against: str | None, figures: "list[Measurement]", patches: "list[PatchSummary]"
) -> None:
    from governance.commands.rendering import percent, table

    compared = [f"under {against}", "p"] if against else []
    table(
        f"Evaluation of {lineage}",
        ["stage", "metric", "dimension", "value", "unit", "95 % interval", "n", *compared, "judge"],
        [
            [
                figure.stage,
                figure.metric,
                figure.dimension,
                _number(figure.value, figure.unit),
                figure.unit,
                _interval(figure),
                figure.n,
                *(_compared(figure) if against else ()),
                figure.judge,
            ]
            for figure in figures
        ],
        right=["value", "95 % interval", "n", *compared],
    )
    for figure in figures:
        for other in figure.agreements:
            kappa = "undefined" if other.agreement.kappa is None else f"{other.agreement.kappa:.2f}"
            click.echo(
                f"{figure.metric} {figure.dimension or ''}".strip()
                + f": {figure.judge} and {other.judge} agree on {percent(other.agreement.share, 1)} of "
                f"{other.agreement.n} answers, Cohen's kappa {kappa}."
            )
    if against and any(figure.comparison is None and figure.unit == "%" for figure in figures):
        click.echo(f"Not compared where {against} has not answered the same prompts: run evaluate --model {against}.")
    if model == "head":
        applied = [patch for patch in patches if patch.state == "applied"]
        shares = sum(patch.modified_share for patch in applied), sum(patch.modified_linear_share for patch in applied)
        click.echo(
            f"{len(applied)} applied patches modified {percent(shares[0])} of all parameters, {percent(shares[1])} of "
            "linear ones."
        )


def _number(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit == "%" else f"{value:.4g}"


def _interval(figure: "Measurement") -> str:
    if figure.interval_low is None or figure.interval_high is None:
        return ""
    return f"{_number(figure.interval_low, figure.unit)} to {_number(figure.interval_high, figure.unit)}"


def _compared(figure: "Measurement") -> list[str]:
    if figure.comparison is None:
        return ["", ""]
    test = figure.comparison.test
    return [f"{figure.comparison.before:.1f}", f"{test.p:.3g}" if test.p >= 1e-4 else "< 0.0001"]
