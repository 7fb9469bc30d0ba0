"""What the benchmark sets beside the product: load and save, a plain copy, and SafeLoRA's dense projection.

The dense projection is formula 2 of SafeLoRA (2405.16833): V Vᵀ/‖V‖_F as an (out, out) matrix times the update.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.checkpoints import Checkpoint
from algorithms.operations import RowEditor
from algorithms.settings import fgsn_settings
from algorithms.weights import CheckpointWeights
from governance.patch_artifact import open_artifact
from registry.files import sync_directory

WIDTH = 4096


def load_and_save(source: Path, target: Path, artifact: Path) -> Mapping[str, Any]:
    """Change rows the plain way: load every shard, assign the rows, save every shard, flush.

    The new rows are read from the patch's artifact, so that their computation costs nothing here.
    """
    started = time.perf_counter()
    shards = {path.name: load_file(path) for path in sorted(source.glob("*.safetensors"))}
    owner = {name: tensors for tensors in shards.values() for name in tensors}
    with open_artifact(artifact) as patch:
        for module in patch.modules:
            rows, values = patch.rows(module.name), patch.values(module.name, "new")
            owner[module.tensor][module.tensor][rows] = values
    target.mkdir(parents=True)
    for file, tensors in shards.items():
        save_file(tensors, target / file, metadata={"format": "pt"})
    unflushed = time.perf_counter() - started
    _flush(target)
    return {"unflushed_seconds": unflushed}


def copy(source: Path, target: Path) -> Mapping[str, Any]:
    """Copy a checkpoint with `cp`, then flush it."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    unflushed = time.perf_counter() - started
    _flush(target)
    return {"unflushed_seconds": unflushed}


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_directory(directory)


def project_rows(models: Path, share: float) -> Mapping[str, Any]:
    """Seconds of the product's `project` on a share of the rows of each 4096 × 4096 module, weights read included."""
    sources = [CheckpointWeights(Checkpoint.open(models / role)) for role in ("subject", "aligned", "base")]
    settings = fgsn_settings("random-control", {"operation": "project"})
    generator = torch.Generator().manual_seed(0)

    def work(module: LinearModule) -> Tensor:
        count = round(share * module.out_features)
        rows = torch.randperm(module.out_features, generator=generator)[:count]
        editor = RowEditor(*sources, module.name, rows, settings)  # type: ignore[arg-type]
        return torch.cat([edit.values for edit in editor.edits()])

    return _timed(work, list(_square(sources[0])))


def project_dense(models: Path) -> Mapping[str, Any]:
    """Seconds of the dense formula on each 4096 × 4096 module, weights read included."""
    subject = CheckpointWeights(Checkpoint.open(models / "subject"))

    def work(module: LinearModule) -> Tensor:
        t, a, b = (
            read_whole(models / role, subject.checkpoint.stored(module.tensor).file, module.tensor)
            for role in ("subject", "aligned", "base")
        )
        return dense_projection(t, a, b)

    return _timed(work, list(_square(subject)))


def read_whole(model: Path, file: str, tensor: str) -> Tensor:
    """One weight, float32 (out, in)."""
    with safe_open(model / file, framework="pt") as handle:
        return torch.as_tensor(handle.get_tensor(tensor)).float()


def dense_projection(subject: Tensor, aligned: Tensor, base: Tensor) -> Tensor:
    """All rows of a + (V Vᵀ/‖V‖_F)(t − a), float32 (out, in)."""
    V = aligned - base
    C = V @ V.T / torch.linalg.norm(V)
    return aligned + C @ (subject - aligned)


def _timed(work: Callable[[LinearModule], Tensor], modules: list[LinearModule]) -> Mapping[str, Any]:
    """Median over the modules, after one that is not counted."""
    seconds, on_cores = [], []
    for module in modules[:1] + modules:
        started, before = time.perf_counter(), time.process_time()
        work(module)
        seconds.append(time.perf_counter() - started)
        on_cores.append(time.process_time() - before)
    return {
        "module_seconds": statistics.median(seconds[1:]),
        "module_cpu_seconds": statistics.median(on_cores[1:]),
        "modules": len(modules),
    }


def _square(weights: CheckpointWeights) -> Iterator[LinearModule]:
    for module in weights.modules.values():
        if (module.out_features, module.in_features) == (WIDTH, WIDTH):
            yield module
