"""The control that knows nothing of harm nor of rows: single weight entries at random as the aligned model has them.

Every linear module's effective weight W_t becomes W_t + M ∘ (W_a − W_t), where M is 1 at each entry with the same
probability; everything else is the subject's. No patch is that: patches write rows, and such an update of a LoRA
subject has no low rank. So it is a checkpoint, in float32 where adapters are merged for it, and else in the file's own
dtype, since every entry is a copy of one of two.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from real_model_models import BenchmarkModels
from torch import Tensor

from algorithms.adapters import is_adapter
from algorithms.architectures import LinearModule
from algorithms.checkpoints import TORCH_DTYPES, Checkpoint
from algorithms.merging import merge_adapter
from algorithms.model_files import tensor_bytes
from algorithms.scores import random_scores
from algorithms.weights import WeightSource, open_weights

SEED = 0


def put_entries_back(models: BenchmarkModels, share: float, output: Path, seed: int = SEED) -> int:
    """Write the subject with single entries put back, unless it is there already.

    Args:
        models: whose subject and aligned model are taken.
        share: probability of each entry of a linear module to be put back.
        output: directory to make; what a run that was stopped left unfinished beside it is removed.
        seed: of the draw; each module's own follows from it and the module's name.

    Returns:
        How many entries the draw took, those that both models have alike among them, as in the rows of a patch.

    Raises:
        NeuronLedgerError: a model cannot be read, or the checkpoint not be written.
    """
    base = models.base if is_adapter(models.subject) else None
    subject, aligned = (open_weights(path, base) for path in (models.subject, models.aligned))
    if not output.exists():
        unfinished = output.with_name(f"{output.name}.unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        if base is None:
            shutil.copytree(models.subject, unfinished)
        else:
            merge_adapter(base, models.subject, unfinished, torch.float32)
        _write_entries(unfinished, subject, aligned, share, seed)
        unfinished.rename(output)
    # Drawn once more, which is quick: the count is known too where the checkpoint was there.
    return sum(int(taken.sum()) for _, taken in _draw(subject, share, seed))


def _draw(weights: WeightSource, share: float, seed: int) -> Iterator[tuple[LinearModule, Tensor]]:
    """M of every linear module, boolean (out, in); a module's depends on no other module."""
    for module in weights.modules.values():
        count = module.out_features * module.in_features
        taken = random_scores(module.name, count, seed, "entries") < share
        yield module, taken.view(module.out_features, module.in_features)


def _write_entries(directory: Path, subject: WeightSource, aligned: WeightSource, share: float, seed: int) -> None:
    """Write W_t + M ∘ (W_a − W_t) over the linear modules of the subject's checkpoint, one at a time."""
    checkpoint = Checkpoint.open(directory)
    rows = slice(None)
    for module, taken in _draw(subject, share, seed):
        mixed = torch.where(taken, aligned.rows(module.name, rows), subject.rows(module.name, rows))
        stored = checkpoint.stored(module.tensor)
        # Exact: float32 stays float32, and what was read from the file goes back to the file's dtype.
        values = (mixed.T if module.transposed else mixed).to(TORCH_DTYPES[stored.dtype])
        with (directory / stored.file).open("rb+") as file:
            file.seek(stored.begin)
            file.write(tensor_bytes(values))
