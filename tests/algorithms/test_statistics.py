"""Streamed statistics against activations that are stored and added up naively."""

import pytest
import torch
from torch import Tensor

from algorithms.architectures import LinearModule, discover
from algorithms.calibration import CalibrationItem
from algorithms.checkpoints import Checkpoint
from algorithms.errors import CalibrationError, NonFiniteError, SettingsError
from algorithms.loading import linear_module
from algorithms.statistics import (
    PromptStatistics,
    StatisticsCollector,
    WantedStatistics,
    gram_bytes,
    require_gram_memory,
    run_prompts,
)
from tests.algorithms.fakes import linear, noise
from tests.tiny_models import load_model, save_adapter, save_model

EVERYTHING = WantedStatistics(input_squares=True, second_moments=True, outputs=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def modules(checkpoint) -> tuple[LinearModule, ...]:
    return discover(Checkpoint.open(checkpoint))


def prompts() -> list[CalibrationItem]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (3, 9, 5, 7, 4):
        tokens = torch.randint(4, 60, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.6).tolist()
        mask[-1] = True
        found.append(CalibrationItem(tuple(tokens), tuple(mask), length))
    return found


def collect(model, modules, wanted: WantedStatistics, batch_size: int = 3) -> PromptStatistics:
    collector = StatisticsCollector(modules, wanted)
    run_prompts(model, prompts(), [collector], batch_size=batch_size, pad_id=0)
    return collector.result()


def stored(model, module: LinearModule) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module on the counted tokens, one prompt at a time and so without padding; float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear_module(model, module.name).register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    inputs, outputs = [], []
    with torch.no_grad():
        for one in prompts():
            model(torch.tensor([one.input_ids]))
            x, y = seen.pop()
            mask = torch.tensor(one.mask)
            inputs.append(x.reshape(-1, x.shape[-1])[mask])
            outputs.append(y.reshape(-1, y.shape[-1])[mask])
    handle.remove()
    return torch.cat(inputs).double(), torch.cat(outputs).double()


def check(model, modules, statistics: PromptStatistics) -> None:
    for module in modules:
        x, y = stored(model, module)
        group = module.input_group
        assert statistics.tokens == len(x)
        torch.testing.assert_close(statistics.input_norms[group], x.norm(dim=0), atol=1e-5, rtol=1e-5)
        G = x.T @ x / len(x)
        torch.testing.assert_close(statistics.second_moments[group].double(), G, atol=1e-5, rtol=1e-4)
        moments = statistics.outputs[module.name]
        torch.testing.assert_close(moments.mean, y.abs().mean(dim=0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moments.variance, y.abs().var(dim=0, correction=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_streamed_sums_are_those_of_stored_activations(checkpoint, modules, batch_size: int) -> None:
    model = load_model(checkpoint)
    check(model, modules, collect(model, modules, EVERYTHING, batch_size))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "opt", "gemma2"])
def test_other_families_are_measured_alike(tmp_path, family: str) -> None:
    path = save_model(tmp_path / family, family)
    modules = discover(Checkpoint.open(path))
    model = load_model(path)
    check(model, modules, collect(model, modules, EVERYTHING))


def test_an_adapter_is_measured_by_its_effective_weights(tmp_path, checkpoint, modules) -> None:
    import peft

    adapter = save_adapter(checkpoint, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(load_model(checkpoint), adapter).eval()
    merged = peft.PeftModel.from_pretrained(load_model(checkpoint), adapter).merge_and_unload().eval()
    check(merged, modules, collect(wrapped, modules, EVERYTHING))


def test_modules_with_one_input_share_one_gram_matrix(checkpoint, modules) -> None:
    statistics = collect(load_model(checkpoint), modules, EVERYTHING)
    assert len(statistics.second_moments) == 4 * 2
    assert "model.layers.0.self_attn.k_proj" not in statistics.second_moments


def test_a_group_is_measured_when_its_first_module_is_out_of_scope(checkpoint, modules) -> None:
    model = load_model(checkpoint)
    values = [module for module in modules if module.kind == "v_proj"]
    check(model, values, collect(model, values, EVERYTHING))


def test_projected_moments_are_those_of_the_projected_inputs(checkpoint, modules) -> None:
    model = load_model(checkpoint)
    module = modules[1]
    R = noise(3, module.in_features, seed=1)
    statistics = collect(model, [module], WantedStatistics(projections={module.name: R}))
    z = stored(model, module)[0] @ R.double().T
    torch.testing.assert_close(statistics.projected_moments[module.name], z.T @ z / len(z), atol=1e-5, rtol=1e-4)
    assert not statistics.second_moments


def test_gram_matrices_can_be_summed_in_double_precision(checkpoint, modules) -> None:
    statistics = collect(
        load_model(checkpoint), modules, WantedStatistics(second_moments=True, gram_dtype=torch.float64)
    )
    assert all(moment.dtype == torch.float64 for moment in statistics.second_moments.values())


def test_bfloat16_models_are_summed_in_full_precision(checkpoint, modules) -> None:
    statistics = collect(load_model(checkpoint, torch.bfloat16), modules, EVERYTHING)
    exact = collect(load_model(checkpoint), modules, EVERYTHING)
    for group, norms in statistics.input_norms.items():
        assert norms.dtype == torch.float64
        torch.testing.assert_close(norms, exact.input_norms[group], rtol=0.1, atol=0.05)


def test_nan_activations_name_the_module(checkpoint, modules) -> None:
    model = load_model(checkpoint)
    model.model.layers[1].self_attn.v_proj.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn"):
        collect(model, modules, EVERYTHING)


def test_prompts_without_counted_tokens_are_refused(checkpoint, modules) -> None:
    collector = StatisticsCollector(modules, EVERYTHING)
    nothing = CalibrationItem((5, 6), (False, False), 2)
    run_prompts(load_model(checkpoint), [nothing], [collector], batch_size=1, pad_id=0)
    with pytest.raises(CalibrationError, match="No calibration token"):
        collector.result()


def test_gram_memory_is_counted_once_per_input_and_limited() -> None:
    shared = [linear("a.q", 4, 1024, group="a.q"), linear("a.k", 4, 1024, group="a.q"), linear("a.o", 4, 512)]
    assert gram_bytes(shared, torch.float32) == 4 * (1024**2 + 512**2)
    require_gram_memory(shared, torch.float32, 0.01)
    with pytest.raises(SettingsError, match=r"gram_memory_gib = 0\.001"):
        require_gram_memory(shared, torch.float32, 0.001)


def test_progress_counts_prompts(checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    run_prompts(load_model(checkpoint), prompts(), [], batch_size=2, pad_id=0, progress=lambda *step: seen.append(step))
    assert seen == [(2, 5), (4, 5), (5, 5)]
