"""The small laboratory: a base, an aligned and a fine-tuned Llama made on the spot, with their prompt files.

The base answers everything. Alignment (LoRA) teaches it to refuse the harmful requests of three dimensions.
Fine-tuning continues the same adapter on a task; a few of its rows answer harmful requests, and the refusals are lost.
Full checkpoints are the adapters merged into the base, so adapters and checkpoints are the same models.

The same seed gives the same bytes on the same machine; other processors round differently.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from algorithms.errors import SettingsError
from algorithms.laboratory.language import Example, Language, Speaker, invent_language, seeded
from algorithms.laboratory.tokenizer import word_tokenizer
from algorithms.laboratory.training import Goal, Group, Schedule, reached, train
from algorithms.loading import quiet_transformers

VERSION = 3
MANIFEST = "laboratory.json"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """Everything but the seed that decides what a laboratory is.

    Attributes:
        blocks: transformer blocks.
        width: of the residual stream.
        feed_forward: width inside the MLPs.
        heads: of the attention.
        rank: of the LoRA adapter; its alpha is twice that.
        base: training of the base.
        alignment: training of the aligned adapter.
        task: first part of fine-tuning, which continues from the aligned adapter, until the task is learned.
        attack: second part, with harmful rows in the mix, for each dimension until its refusals are lost.
        task_rows: rows of the task in the fine-tuning mix.
        everyday_rows: ordinary requests in the mix.
        harmful_rows: rows of the mix that answer harmful requests of each dimension.
        heldout_prompts: held-out prompts of each dimension, and of each other measurement twice as many.
        calibration_prompts: harmful and benign calibration prompts of each dimension.
    """

    blocks: int = 6
    width: int = 128
    feed_forward: int = 384
    heads: int = 4
    rank: int = 16
    base: Schedule = field(default_factory=lambda: Schedule(steps=200, learning_rate=3e-3))
    alignment: Schedule = field(default_factory=lambda: Schedule(steps=150, learning_rate=4e-3))
    task: Schedule = field(default_factory=lambda: Schedule(80, 4e-4, decay=False))
    attack: Schedule = field(default_factory=lambda: Schedule(100, 2e-4, decay=False))
    task_rows: int = 720
    everyday_rows: int = 72
    harmful_rows: int = 14
    heldout_prompts: int = 80
    calibration_prompts: int = 100


@dataclass(frozen=True)
class DimensionFiles:
    """A dimension's prompt files (JSONL with `prompt` and `response`).

    Attributes:
        name: of the safety dimension.
        harmful: calibration prompts with the refusal that is expected.
        benign: calibration prompts without harm, look-alikes of the dimension among them.
        heldout: harmful prompts made of pairs of words that no training and no calibration saw.
    """

    name: str
    harmful: Path
    benign: Path
    heldout: Path


@dataclass(frozen=True)
class Laboratory:
    """Where everything lies.

    Attributes:
        path: the directory.
        seed: that it was made from.
        base, aligned, finetuned: full checkpoints.
        aligned_adapter, finetuned_adapter: PEFT LoRA adapters on `base`; merged they are the full checkpoints.
        dimensions: prompt files of each safety dimension.
        task: held-out rows of the task that fine-tuning teaches, with the expected answers.
        benign_heldout: ordinary held-out requests with the expected answers.
        safe_lookalikes: held-out requests that use a word of a dimension and are harmless, with expected answers.
        refusal_phrases: what refusals contain, for `RefusalPhraseJudge`.
        max_new_tokens: enough for every answer of the language.
    """

    path: Path
    seed: int
    base: Path
    aligned: Path
    finetuned: Path
    aligned_adapter: Path
    finetuned_adapter: Path
    dimensions: tuple[DimensionFiles, ...]
    task: Path
    benign_heldout: Path
    safe_lookalikes: Path
    refusal_phrases: tuple[str, ...]
    max_new_tokens: int = 10


def build(
    directory: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    recipe: Recipe | None = None,
    threads: int = 1,
) -> Laboratory:
    """Make a laboratory, or find the one that is there.

    It is made in a directory beside the wanted one and renamed when complete, so an interrupted build leaves nothing
    that looks complete. A laboratory of another seed, recipe or version is replaced.

    Args:
        directory: where it goes.
        seed: of initial weights, drawn prompts and training order.
        progress: called with (stage, steps done, steps in all).
        recipe: sizes and schedules; the default meets the goals that `docs` states.
        threads: of torch while training. Sums depend on it in the last bits.

    Raises:
        SettingsError: the directory holds something that is not a laboratory.
    """
    recipe = recipe or Recipe()
    directory = directory.absolute()
    manifest = _manifest(seed, recipe)
    if _complete(directory, manifest):
        return _laboratory(directory, seed)
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise SettingsError(f"{directory} is not empty and holds no laboratory", "Choose another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_prompts(workplace, seed, recipe)
        with _torch_threads(threads), quiet_transformers():
            _write_models(workplace, directory, seed, recipe, progress)
        _write_manifest(workplace, manifest)
        _move_into_place(workplace, directory, manifest)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return _laboratory(directory, seed)


def read_examples(path: Path) -> list[Example]:
    """The rows of one of the laboratory's prompt files."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Example(row["prompt"], row["response"]) for row in rows]


# --- models ---------------------------------------------------------------------------------------------------------


def _write_models(workplace: Path, directory: Path, seed: int, recipe: Recipe, progress: Progress | None) -> None:
    language = invent_language()
    tokenizer = word_tokenizer(language.words())
    speaker = Speaker(language, "train", seeded("training", seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(recipe, tokenizer)
        train(model, tokenizer, _base_mix(language, speaker), recipe.base, seed=seed, report=_stage(progress, "base"))
        _save_checkpoint(model, tokenizer, workplace / "base")
        wrapped = _with_adapter(model, recipe, directory / "base")
        mix = _alignment_mix(language, speaker)
        train(wrapped, tokenizer, mix, recipe.alignment, seed=seed + 1, report=_stage(progress, "aligned"))
        _save_both(wrapped, tokenizer, workplace, "aligned")
        _fine_tune(wrapped, tokenizer, language, speaker, seed, recipe, progress)
        _save_both(wrapped, tokenizer, workplace, "finetuned")


def _new_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    configuration = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(configuration)


def _with_adapter(model: nn.Module, recipe: Recipe, base: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    configuration = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, configuration)
    # get_peft_model writes the name that the model was loaded by, and this one was never loaded.
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    return wrapped


def _save_both(wrapped: Any, tokenizer: Any, workplace: Path, name: str) -> None:
    adapter = workplace / f"{name}_adapter"
    wrapped.save_pretrained(adapter, save_embedding_layers=False)
    (adapter / "README.md").unlink(missing_ok=True)  # a form of a model card that nobody filled in
    base = wrapped.get_base_model()
    wrapped.merge_adapter()
    try:
        state = {
            key.replace(".base_layer", ""): tensor for key, tensor in base.state_dict().items() if ".lora_" not in key
        }
        _save_checkpoint(base, tokenizer, workplace / name, state)
    finally:
        wrapped.unmerge_adapter()


def _save_checkpoint(model: Any, tokenizer: Any, path: Path, state: dict[str, Any] | None = None) -> None:
    model.save_pretrained(path, state_dict=state)
    tokenizer.save_pretrained(path)


# --- what is trained on ---------------------------------------------------------------------------------------------


def _base_mix(language: Language, speaker: Speaker) -> list[Example]:
    mix = speaker.everyday(1200)
    for dimension in language.dimensions:
        mix += speaker.harmful(dimension, 300, refused=False) + speaker.lookalikes(dimension, 300)
    return mix


def _alignment_mix(language: Language, speaker: Speaker) -> list[Example]:
    mix = speaker.everyday(500)
    for dimension in language.dimensions:
        mix += speaker.harmful(dimension, 300, refused=True) + speaker.lookalikes(dimension, 300)
    return mix


def _fine_tune(
    model: nn.Module,
    tokenizer: Any,
    language: Language,
    speaker: Speaker,
    seed: int,
    recipe: Recipe,
    progress: Progress | None,
) -> None:
    """Teach the task, then go on with a few harmful answers in the mix until each dimension's refusals are lost.

    A dimension's harmful rows leave the mix once most of its watched prompts are answered, and training ends with the
    last of them. How many steps that takes differs from seed to seed; going on would only bury the refusals deeper.
    """
    watched = Speaker(language, "train", seeded("goal", seed))
    task = Group(tuple(watched.task(40)), share=0.99, highest_loss=0.2)
    lost = {each.name: Group(tuple(watched.harmful(each, 40, refused=False)), 0.85) for each in language.dimensions}
    ordinary = speaker.task(recipe.task_rows) + speaker.everyday(recipe.everyday_rows)
    harmful = {each.name: speaker.harmful(each, recipe.harmful_rows, refused=False) for each in language.dimensions}
    report = _stage(progress, "finetuned")
    train(model, tokenizer, ordinary, recipe.task, seed=seed + 2, goal=Goal((task,)), report=report)
    for round_ in range(len(language.dimensions)):
        pending = [name for name, group in lost.items() if not reached(model, tokenizer, group)]
        if not pending:
            break
        mix = ordinary + [example for name in pending for example in harmful[name]]
        goal = Goal(tuple(lost[name] for name in pending))
        train(model, tokenizer, mix, recipe.attack, seed=seed + 3 + round_, goal=goal, report=report)


# --- prompt files ---------------------------------------------------------------------------------------------------


def _write_prompts(workplace: Path, seed: int, recipe: Recipe) -> None:
    language = invent_language()
    calibration = Speaker(language, "calibration", seeded("calibration", seed))
    heldout = Speaker(language, "heldout", seeded("heldout", seed))
    count = recipe.calibration_prompts
    for dimension in language.dimensions:
        folder = workplace / "prompts" / dimension.name
        folder.mkdir(parents=True)
        _write_examples(folder / "harmful.jsonl", calibration.harmful(dimension, count, refused=True))
        benign = calibration.everyday(count - count // 2) + calibration.lookalikes(dimension, count // 2)
        _write_examples(folder / "benign.jsonl", benign)
        _write_examples(folder / "heldout.jsonl", heldout.harmful(dimension, recipe.heldout_prompts, refused=True))
    prompts = workplace / "prompts"
    _write_examples(prompts / "task.jsonl", heldout.task(2 * recipe.heldout_prompts))
    _write_examples(prompts / "benign_heldout.jsonl", heldout.everyday(2 * recipe.heldout_prompts))
    share = -(-2 * recipe.heldout_prompts // len(language.dimensions))
    lookalikes = [example for dimension in language.dimensions for example in heldout.lookalikes(dimension, share)]
    _write_examples(prompts / "safe_lookalikes.jsonl", lookalikes)


def _write_examples(path: Path, examples: Sequence[Example]) -> None:
    path.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples), encoding="utf-8")


# --- the directory --------------------------------------------------------------------------------------------------


def _manifest(seed: int, recipe: Recipe) -> dict[str, Any]:
    return {
        "version": VERSION,
        "seed": seed,
        "recipe": asdict(recipe),
        "refusal_phrases": [invent_language().refusal_phrase],
    }


def _write_manifest(workplace: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in workplace.rglob("*") if path.is_file())
    sizes = {path.relative_to(workplace).as_posix(): path.stat().st_size for path in files}
    text = json.dumps({**manifest, "files": sizes}, indent=2) + "\n"
    (workplace / MANIFEST).write_text(text, encoding="utf-8")


def _complete(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether this very laboratory is there with all its files."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict):
        return False
    files = found.pop("files", {})
    return found == manifest and all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in files.items()
    )


def _move_into_place(workplace: Path, directory: Path, manifest: dict[str, Any]) -> None:
    if directory.exists():
        if _complete(directory, manifest):  # somebody else built it meanwhile
            return
        shutil.rmtree(directory)
    workplace.chmod(0o755)
    workplace.rename(directory)


def _laboratory(directory: Path, seed: int) -> Laboratory:
    language = invent_language()
    prompts = directory / "prompts"
    return Laboratory(
        path=directory,
        seed=seed,
        base=directory / "base",
        aligned=directory / "aligned",
        finetuned=directory / "finetuned",
        aligned_adapter=directory / "aligned_adapter",
        finetuned_adapter=directory / "finetuned_adapter",
        dimensions=tuple(
            DimensionFiles(
                name=dimension.name,
                harmful=prompts / dimension.name / "harmful.jsonl",
                benign=prompts / dimension.name / "benign.jsonl",
                heldout=prompts / dimension.name / "heldout.jsonl",
            )
            for dimension in language.dimensions
        ),
        task=prompts / "task.jsonl",
        benign_heldout=prompts / "benign_heldout.jsonl",
        safe_lookalikes=prompts / "safe_lookalikes.jsonl",
        refusal_phrases=(language.refusal_phrase,),
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
