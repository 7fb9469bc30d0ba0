"""The invariants of the projection: what may change, what must come back exactly, and that all forms agree."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms import differences, operations, projection
from algorithms.differences import Difference
from algorithms.errors import MismatchError, NonFiniteError, SettingsError
from algorithms.operations import ModuleStatistics, RowEdit, RowEditor, edit_rows
from algorithms.projection import SafetyProjection, leading_directions
from algorithms.settings import FgsnSettings
from algorithms.weights import LoraFactors, WeightSource
from tests.algorithms.fakes import FullWeights, LoraWeights, full, lora, low_rank, noise

OPERATIONS = ("restore", "project", "complement", "subspace")
NORMALIZATIONS = ("fro", "numel", "in", "orthogonal")

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12))
seeds = st.integers(0, 10_000)
strengths = st.sampled_from([0.25, 0.5, 1.0])


def three_models(
    outputs: int, inputs: int, seed: int, *, drift: float = 0.3
) -> tuple[FullWeights, FullWeights, FullWeights]:
    base = noise(outputs, inputs, seed=seed)
    aligned = base + noise(outputs, inputs, seed=seed + 1, scale=0.5)
    subject = aligned + noise(outputs, inputs, seed=seed + 2, scale=drift)
    return full("subject", m=subject), full("aligned", m=aligned), full("base", m=base)


def some_rows(outputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(outputs, generator=generator)[: max(1, outputs // 2)].sort().values


def statistics_for(inputs: int, seed: int, rank: int = 2) -> ModuleStatistics:
    x = noise(3 * inputs, inputs, seed=seed)
    return ModuleStatistics(x.norm(dim=0), leading_directions(x.T @ x, min(rank, inputs)))


def dense_operator(aligned: WeightSource, base: WeightSource, chosen: FgsnSettings) -> Tensor:
    """C, formed whole in float64."""
    everything = slice(0, aligned.modules["m"].out_features)
    V = (aligned.rows("m", everything) - base.rows("m", everything)).double()
    if chosen.normalization == "orthogonal":
        U, S, _ = torch.linalg.svd(V, full_matrices=False)
        count = int((S.square().cumsum(0) / S.square().sum() < chosen.energy - 1e-9).sum()) + 1
        return U[:, :count] @ U[:, :count].T
    N = {"fro": float(V.norm()), "numel": V.numel(), "in": V.shape[1]}[chosen.normalization]
    C = V @ V.T / N
    return C / max(1.0, float(torch.linalg.eigvalsh(C)[-1]))


def dense_result(W_t: Tensor, W_a: Tensor, C: Tensor, Q: Tensor | None, chosen: FgsnSettings) -> Tensor:
    """The operation on every row of the module, formed whole in float64."""
    W_t, W_a, c = W_t.double(), W_a.double(), chosen.strength
    U = W_t - W_a
    if chosen.target == "full":
        return (1 - c) * W_t + c * C @ W_t
    if chosen.operation == "restore":
        return W_t - c * U
    if chosen.operation == "project":
        return W_a + (1 - c) * U + c * C @ U
    if chosen.operation == "complement":
        return W_t - c * C @ U
    assert Q is not None
    return W_t - c * U @ Q.double() @ Q.double().T


def effective(subject: LoraWeights, edit: RowEdit) -> tuple[Tensor, Tensor]:
    """Effective weight of all rows before and after an edit of a LoRA subject has been written."""
    factors = subject.lora["m"]
    A = factors.A if edit.extension is None else torch.cat([factors.A, edit.extension])
    B = torch.zeros(factors.B.shape[0], A.shape[0])
    B[:, : factors.B.shape[1]] = factors.B
    B[edit.rows] = edit.values
    base = subject.base.weights["m"].double()
    before = base + factors.scale * factors.B.double() @ factors.A.double()
    return before, base + factors.scale * B.double() @ A.double()


def continued_adapter(outputs: int, inputs: int, rank: int, seed: int) -> tuple[LoraWeights, LoraWeights, FullWeights]:
    """A subject whose adapter was trained on from the aligned model's."""
    base = full("base", m=noise(outputs, inputs, seed=seed))
    of_aligned = low_rank(outputs, inputs, rank, seed=seed + 1)
    of_subject = LoraFactors(
        of_aligned.A + noise(rank, inputs, seed=seed + 7, scale=0.1),
        of_aligned.B + noise(outputs, rank, seed=seed + 8, scale=0.1),
        1.5,
    )
    return lora("subject", base, m=of_subject), lora("aligned", base, m=of_aligned), base


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.sampled_from(OPERATIONS), st.sampled_from(NORMALIZATIONS), strengths)
def test_rows_of_a_full_model_agree_with_the_dense_formula(
    shape: tuple[int, int], seed: int, operation: Any, normalization: Any, strength: float
) -> None:
    subject, aligned, base = three_models(*shape, seed)
    chosen = FgsnSettings(operation=operation, normalization=normalization, strength=strength, energy=0.7)
    statistics = statistics_for(shape[1], seed)
    rows = some_rows(shape[0], seed)
    edit = edit_rows(subject, aligned, base, "m", rows, chosen, statistics)
    C = dense_operator(aligned, base, chosen)
    expected = dense_result(subject.weights["m"], aligned.weights["m"], C, statistics.directions, chosen)
    torch.testing.assert_close(edit.values.double(), expected[rows], atol=2e-5, rtol=2e-5)
    assert edit.extension is None
    assert torch.equal(edit.rows, rows)


@settings(max_examples=60, deadline=None)
@given(
    shapes, seeds, st.sampled_from(OPERATIONS), st.sampled_from(NORMALIZATIONS), strengths, st.booleans(), st.booleans()
)
def test_the_lora_form_agrees_with_the_dense_formula_after_merging(
    shape: tuple[int, int], seed: int, operation: Any, normalization: Any, strength: float, continued: bool, own_V: bool
) -> None:
    outputs, inputs = shape
    subject, adapter, checkpoint = continued_adapter(outputs, inputs, 2, seed)
    aligned: FullWeights | LoraWeights = adapter if continued else checkpoint
    # The unaligned model: another checkpoint, or (a factored V) the checkpoint under the aligned adapter.
    base = checkpoint if continued and own_V else full("w0", m=checkpoint.weights["m"] - noise(*shape, seed=seed + 3))
    chosen = FgsnSettings(operation=operation, normalization=normalization, strength=strength, energy=0.7)
    statistics = statistics_for(inputs, seed)
    rows = some_rows(outputs, seed)
    edit = edit_rows(subject, aligned, base, "m", rows, chosen, statistics)
    before, after = effective(subject, edit)
    W_a = aligned.rows("m", slice(0, outputs))
    expected = dense_result(before, W_a, dense_operator(aligned, base, chosen), statistics.directions, chosen)
    torch.testing.assert_close(after[rows], expected[rows], atol=3e-4, rtol=3e-4)
    others = torch.ones(outputs, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(after[others], before[others])
    if operation != "subspace" and not continued:
        assert edit.extension is None, "output-side operations on an adapter leave lora_A as it is"


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, st.sampled_from(OPERATIONS), st.booleans())
def test_strength_zero_leaves_every_bit(shape: tuple[int, int], seed: int, operation: Any, of_lora: bool) -> None:
    subject: FullWeights | LoraWeights
    subject, aligned, base = three_models(*shape, seed)
    subject.weights["m"][:, 0] = -0.0  # type: ignore[index]
    expected = subject.weights["m"]
    if of_lora:
        subject = lora("subject", aligned, m=low_rank(*shape, 2, seed=seed))
        expected = subject.lora["m"].B
    rows = some_rows(shape[0], seed)
    edit = edit_rows(subject, aligned, base, "m", rows, FgsnSettings(operation=operation, strength=0.0))
    assert same_bits(edit.values, expected[rows])
    assert edit.extension is None


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, st.sampled_from(OPERATIONS), st.sampled_from(NORMALIZATIONS), strengths)
def test_a_subject_equal_to_the_aligned_model_keeps_every_bit(
    shape: tuple[int, int], seed: int, operation: Any, normalization: Any, strength: float
) -> None:
    _, aligned, base = three_models(*shape, seed)
    aligned.weights["m"][0, 0] = -0.0  # type: ignore[index]
    subject = full("subject", m=aligned.weights["m"].clone())
    chosen = FgsnSettings(operation=operation, normalization=normalization, strength=strength)
    edit = edit_rows(subject, aligned, base, "m", torch.arange(shape[0]), chosen, statistics_for(shape[1], seed))
    assert same_bits(edit.values, subject.weights["m"])


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, st.sampled_from(OPERATIONS), strengths)
def test_an_adapter_equal_to_the_aligned_adapter_keeps_every_effective_row(
    shape: tuple[int, int], seed: int, operation: Any, strength: float
) -> None:
    _, aligned, base = continued_adapter(*shape, 2, seed)
    subject = lora("subject", base, m=aligned.lora["m"])
    chosen = FgsnSettings(operation=operation, strength=strength)
    edit = edit_rows(subject, aligned, base, "m", torch.arange(shape[0]), chosen, statistics_for(shape[1], seed))
    before, after = effective(subject, edit)
    assert torch.equal(before, after)


@settings(max_examples=30, deadline=None)
@given(shapes, seeds)
def test_restored_rows_are_the_aligned_rows_bit_for_bit(shape: tuple[int, int], seed: int) -> None:
    subject, aligned, base = three_models(*shape, seed)
    rows = some_rows(shape[0], seed)
    edit = edit_rows(subject, aligned, base, "m", rows, FgsnSettings(operation="restore"))
    assert same_bits(edit.values, aligned.weights["m"][rows])


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, st.sampled_from(NORMALIZATIONS))
def test_without_safety_directions_projected_rows_return_to_the_aligned_model(
    shape: tuple[int, int], seed: int, normalization: Any
) -> None:
    subject, aligned, _ = three_models(*shape, seed)
    base = full("base", m=aligned.weights["m"].clone())
    rows = some_rows(shape[0], seed)
    chosen = FgsnSettings(operation="project", normalization=normalization)
    assert same_bits(edit_rows(subject, aligned, base, "m", rows, chosen).values, aligned.weights["m"][rows])
    adapter = lora("adapter", aligned, m=low_rank(*shape, 2, seed=seed))
    edit = edit_rows(adapter, aligned, base, "m", rows, chosen)
    assert torch.equal(edit.values, torch.zeros(len(rows), 2))


@settings(max_examples=30, deadline=None)
@given(shapes, seeds)
def test_a_subspace_edit_takes_the_whole_action_on_the_directions_away(shape: tuple[int, int], seed: int) -> None:
    subject, aligned, base = three_models(*shape, seed)
    statistics = statistics_for(shape[1], seed)
    chosen = FgsnSettings(operation="subspace")
    edit = edit_rows(subject, aligned, base, "m", torch.arange(shape[0]), chosen, statistics)
    assert statistics.directions is not None
    action = (edit.values - aligned.weights["m"]).double() @ statistics.directions.double()
    assert float(action.abs().max()) < 1e-5


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, st.sampled_from(["restore", "project", "complement"]))
def test_output_side_edits_keep_a_direction_on_which_the_update_does_nothing(
    shape: tuple[int, int], seed: int, operation: Any
) -> None:
    """What makes claimed directions safe from later row patches."""
    subject, aligned, base = three_models(*shape, seed)
    Q = statistics_for(shape[1], seed).directions
    assert Q is not None
    U = subject.weights["m"] - aligned.weights["m"]
    cleared = full("cleared", m=aligned.weights["m"] + U - U @ Q @ Q.T)
    rows = some_rows(shape[0], seed)
    edit = edit_rows(cleared, aligned, base, "m", rows, FgsnSettings(operation=operation))
    action = (edit.values - aligned.weights["m"][rows]) @ Q
    assert float(action.abs().max()) < 1e-5


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, st.floats(0.05, 1.0))
def test_entries_change_the_most_damaged_share_only(shape: tuple[int, int], seed: int, share: float) -> None:
    subject, aligned, base = three_models(*shape, seed)
    statistics = statistics_for(shape[1], seed)
    rows = some_rows(shape[0], seed)
    edit = edit_rows(subject, aligned, base, "m", rows, FgsnSettings(operation="restore", entries=share), statistics)
    assert statistics.input_norms is not None
    t, a = subject.weights["m"][rows], aligned.weights["m"][rows]
    damage = (t - a).abs() * statistics.input_norms
    count = max(1, round(share * t.numel()))
    least = damage.reshape(-1).sort(descending=True).values[count - 1]
    assert torch.equal(edit.values, torch.where(damage >= least, a, t))


def test_the_rank_does_not_grow_when_the_aligned_basis_is_already_there() -> None:
    subject, aligned, base = continued_adapter(9, 7, 3, seed=5)
    first = edit_rows(subject, aligned, base, "m", torch.tensor([1, 4]), FgsnSettings(operation="restore"))
    assert first.extension is not None
    factors = subject.lora["m"]
    B = torch.cat([factors.B, torch.zeros(9, 3)], dim=1)
    B[first.rows] = first.values
    head = lora("head", base, m=LoraFactors(torch.cat([factors.A, first.extension]), B, factors.scale))
    second = edit_rows(head, aligned, base, "m", torch.tensor([0, 8]), FgsnSettings(operation="restore"))
    assert second.extension is None
    _, after = effective(head, second)
    expected = aligned.rows("m", torch.tensor([0, 1, 4, 8])).double()
    torch.testing.assert_close(after[[0, 1, 4, 8]], expected, atol=1e-5, rtol=1e-5)


def test_an_appended_basis_is_recognised_after_rounding_to_bfloat16() -> None:
    subject, aligned, base = continued_adapter(6, 5, 2, seed=5)
    factors = subject.lora["m"]
    rounded = torch.cat([factors.A, aligned.lora["m"].A]).bfloat16().float()
    head = lora("head", base, m=LoraFactors(rounded, torch.cat([factors.B, torch.zeros(6, 2)], dim=1), 1.5))
    edit = edit_rows(head, aligned, base, "m", torch.tensor([3]), FgsnSettings(operation="restore"))
    assert edit.extension is None
    exact = aligned.lora["m"].B[3] * (aligned.lora["m"].scale / 1.5)
    assert torch.equal(edit.values, torch.cat([torch.zeros(2), exact])[None])


def test_blocks_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, aligned, base = three_models(40, 6, seed=3)
    statistics = statistics_for(6, 3)
    rows = some_rows(40, 3)
    variants = [
        FgsnSettings(operation=operation, normalization=normalization, entries=entries)
        for operation in OPERATIONS
        for normalization in ("fro", "orthogonal")
        for entries in (None, 0.3)
    ]
    whole = [edit_rows(subject, aligned, base, "m", rows, chosen, statistics).values for chosen in variants]
    for part in (differences, operations):
        monkeypatch.setattr(part, "BLOCK_BYTES", 4 * 6 * 7)
    for part in (differences, operations, projection):
        monkeypatch.setattr(part, "STREAM_BYTES", 4 * 6 * 4)
    for chosen, expected in zip(variants, whole, strict=True):
        edits = list(RowEditor(subject, aligned, base, "m", rows, chosen, statistics).edits())
        projects = chosen.operation in {"project", "complement"}
        assert [len(edit.rows) for edit in edits] == ([4, 3, 4, 3, 4, 2] if projects else [4, 4, 4, 4, 4])
        torch.testing.assert_close(torch.cat([edit.values for edit in edits]), expected, atol=1e-5, rtol=1e-5)


def test_a_full_target_moves_rows_towards_their_projection() -> None:
    subject, aligned, base = three_models(8, 6, seed=2)
    chosen = FgsnSettings(operation="project", target="full")
    assert chosen.strength == 0.2
    edit = edit_rows(subject, aligned, base, "m", torch.tensor([2, 5]), chosen)
    expected = dense_result(
        subject.weights["m"], aligned.weights["m"], dense_operator(aligned, base, chosen), None, chosen
    )
    torch.testing.assert_close(edit.values.double(), expected[[2, 5]], atol=1e-5, rtol=1e-5)


def test_editors_that_wait_hold_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan makes the editors of all modules before the first computes; only the one at work may hold a difference."""
    held: list[weakref.ref[Difference]] = []

    class Watched(Difference):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            held.append(weakref.ref(self))

    monkeypatch.setattr(operations, "Difference", Watched)
    models = three_models(8, 6, seed=2)
    chosen = FgsnSettings(operation="project")
    editors = [RowEditor(*models, "m", torch.tensor([row]), chosen) for row in range(3)]
    assert held == []
    for done, editor in enumerate(editors, start=1):
        assert len(list(editor.edits())) == 1
        assert [reference() for reference in held] == [None] * done


def test_a_subspace_without_directions_changes_nothing() -> None:
    subject, _, base = continued_adapter(6, 5, 2, seed=1)
    nothing = ModuleStatistics(directions=torch.zeros(5, 0))
    edit = edit_rows(subject, base, base, "m", torch.tensor([0, 3]), FgsnSettings(operation="subspace"), nothing)
    assert edit.extension is None
    assert same_bits(edit.values, subject.lora["m"].B[[0, 3]])


def test_no_rows_give_an_empty_edit() -> None:
    subject, aligned, base = three_models(8, 6, seed=2)
    edit = edit_rows(subject, aligned, base, "m", torch.zeros(0, dtype=torch.int64), FgsnSettings(operation="restore"))
    assert edit.values.shape == (0, 6)


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        (FgsnSettings(operation="project", target="full"), "target full"),
        (FgsnSettings(operation="restore", entries=0.1), "sparse"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(chosen: FgsnSettings, problem: str) -> None:
    subject, aligned, base = continued_adapter(6, 5, 2, seed=1)
    with pytest.raises(SettingsError, match=problem):
        edit_rows(subject, aligned, base, "m", torch.tensor([0]), chosen, statistics_for(5, 1))


def test_an_aligned_model_that_is_not_under_the_adapter_is_refused() -> None:
    subject, _, base = continued_adapter(6, 5, 2, seed=1)
    stranger = full("stranger", m=base.weights["m"] + 1)
    with pytest.raises(MismatchError, match="neither the checkpoint under the subject's adapter nor an adapter on it"):
        edit_rows(subject, stranger, base, "m", torch.tensor([0]), FgsnSettings(operation="restore"))


def test_a_module_without_adapter_is_refused() -> None:
    base = full("base", m=noise(4, 3, seed=0))
    with pytest.raises(MismatchError, match="no factors for m"):
        edit_rows(lora("subject", base), base, base, "m", torch.tensor([0]), FgsnSettings(operation="restore"))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("which", ["subject", "aligned", "base"])
def test_nan_is_refused_by_module_name(operation: Any, which: str) -> None:
    models = dict(zip(("subject", "aligned", "base"), three_models(6, 5, seed=1), strict=True))
    models[which].weights["m"][2, 3] = float("nan")
    if which == "base" and operation in {"restore", "subspace"}:
        return  # they do not read it
    with pytest.raises(NonFiniteError, match=r"of m holds NaN"):
        edit_rows(*models.values(), "m", torch.arange(6), FgsnSettings(operation=operation), statistics_for(5, 1))


@pytest.mark.parametrize(("rows", "problem"), [([0, 6], "no row 6"), ([-1], "no row -1"), ([2, 2], "named twice")])
def test_impossible_rows_are_refused(rows: list[int], problem: str) -> None:
    with pytest.raises(MismatchError, match=problem):
        edit_rows(*three_models(6, 5, seed=1), "m", torch.tensor(rows), FgsnSettings(operation="restore"))


@pytest.mark.parametrize("chosen", [FgsnSettings(operation="subspace"), FgsnSettings(operation="restore", entries=0.5)])
def test_missing_statistics_are_asked_for(chosen: FgsnSettings) -> None:
    with pytest.raises(SettingsError, match="lacks"):
        edit_rows(*three_models(6, 5, seed=1), "m", torch.tensor([1]), chosen)


def test_the_operator_is_not_needed_to_restore() -> None:
    """Restoring reads neither W_0 nor V, so a lineage without a base can restore."""
    subject, aligned, base = three_models(6, 5, seed=1)
    broken = full("broken", m=torch.full_like(base.weights["m"], float("nan")))
    edit = edit_rows(subject, aligned, broken, "m", torch.tensor([1]), FgsnSettings(operation="restore"))
    assert same_bits(edit.values, aligned.weights["m"][[1]])


def test_a_difference_of_one_checkpoint_is_exactly_zero() -> None:
    base = full("base", m=noise(4, 3, seed=0))
    assert Difference(base, base, "m").norm() == 0.0
    assert SafetyProjection(Difference(base, base, "m"), "fro").is_zero


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))
