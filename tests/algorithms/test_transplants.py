"""The invariants of the transplantation: what takes the reference's place, what stays, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithms import transplants
from algorithms.errors import MismatchError, NonFiniteError, SettingsError
from algorithms.nlsr_settings import NlsrSettings
from algorithms.operations import RowEdit
from algorithms.references import reference_weights
from algorithms.regions import FactorMasks
from algorithms.transplants import (
    FactorEditor,
    TransplantEditor,
    require_continuation,
    require_unprotected,
    transplanted_factors,
)
from algorithms.weights import LoraFactors, WeightSource
from tests.algorithms.fakes import FullWeights, LoraWeights, full, lora, low_rank, noise

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12))
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows even in tiny modules."""
    monkeypatch.setattr(transplants, "STREAM_BYTES", 64)


def some_rows(outputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(outputs, generator=generator)[: max(1, outputs // 2)].sort().values


def whole_edit(editor: TransplantEditor | FactorEditor) -> RowEdit:
    edits = list(editor.edits())
    assert torch.equal(torch.cat([edit.rows for edit in edits]), editor.row_index)
    assert all(edit.extension is editor.extension for edit in edits)
    before, values = (torch.cat(parts) for parts in ([e.before for e in edits], [e.values for e in edits]))
    return RowEdit(editor.row_index, before, values, editor.extension)


def written(subject: LoraWeights, edit: RowEdit) -> LoraFactors:
    """Factors of a LoRA subject after an edit was written as a patch writes it."""
    factors = subject.lora["m"]
    A = factors.A if edit.extension is None else torch.cat([factors.A, edit.extension])
    B = torch.zeros(factors.B.shape[0], A.shape[0])
    B[:, : factors.B.shape[1]] = factors.B
    B[edit.rows] = edit.values
    return LoraFactors(A, B, factors.scale)


def continued(outputs: int, inputs: int, rank: int, seed: int) -> tuple[LoraWeights, LoraWeights, FullWeights]:
    """A subject whose adapter was trained on from the aligned one's, at another scale."""
    base = full("base", m=noise(outputs, inputs, seed=seed))
    of_aligned = low_rank(outputs, inputs, rank, seed=seed + 1)
    of_subject = LoraFactors(
        of_aligned.A + noise(rank, inputs, seed=seed + 7, scale=0.1),
        of_aligned.B + noise(outputs, rank, seed=seed + 8, scale=0.1),
        1.5,
    )
    return lora("subject", base, m=of_subject), lora("aligned", base, m=of_aligned), base


def update(factors: LoraFactors) -> Tensor:
    return factors.scale * factors.B.double() @ factors.A.double()


def full_region(factors: LoraFactors) -> FactorMasks:
    return FactorMasks(torch.ones_like(factors.A, dtype=torch.bool), torch.ones_like(factors.B, dtype=torch.bool))


def random_masks(factors: LoraFactors, seed: int) -> FactorMasks:
    return FactorMasks(noise(*factors.A.shape, seed=seed) > 0.5, noise(*factors.B.shape, seed=seed + 1) > 0.5)


@given(shapes, seeds)
def test_rows_of_a_full_model_take_the_references_exactly(shape: tuple[int, int], seed: int) -> None:
    base, aligned = full("b", m=noise(*shape, seed=seed)), full("a", m=noise(*shape, seed=seed + 1))
    reference = reference_weights(aligned, base, NlsrSettings())
    rows = some_rows(shape[0], seed)
    edit = whole_edit(TransplantEditor(full("t", m=noise(*shape, seed=seed + 2)), reference, "m", rows))
    assert torch.equal(edit.values, reference.rows("m", rows))
    assert torch.equal(edit.rows, rows)
    assert edit.extension is None


@given(shapes, seeds, st.integers(1, 4))
def test_the_neuron_form_of_an_adapter_takes_rows_and_leaves_the_others_exactly(
    shape: tuple[int, int], seed: int, rank: int
) -> None:
    subject, aligned, base = continued(*shape, rank, seed)
    reference = reference_weights(aligned, base, NlsrSettings(beta=0.5))
    rows = some_rows(shape[0], seed)
    edit = whole_edit(TransplantEditor(subject, reference, "m", rows))
    after = written(subject, edit)
    assert after.A.shape[0] == 2 * rank
    of_reference = reference.factors("m")
    assert of_reference is not None
    torch.testing.assert_close(update(after)[rows], update(of_reference)[rows], atol=1e-4, rtol=1e-5)
    others = torch.ones(shape[0], dtype=torch.bool)
    others[rows] = False
    assert torch.equal(update(after)[others], update(subject.lora["m"])[others])
    assert torch.equal(after.B[others, :rank], subject.lora["m"].B[others])


@given(shapes, seeds, st.integers(1, 4))
def test_a_basis_that_is_already_there_is_not_appended_again(shape: tuple[int, int], seed: int, rank: int) -> None:
    subject, aligned, base = continued(*shape, rank, seed)
    reference = reference_weights(aligned, base, NlsrSettings(beta=0.5))
    first = whole_edit(TransplantEditor(subject, reference, "m", torch.tensor([0])))
    patched = lora("patched", base, m=written(subject, first))
    # The rows of A_a serve a reference of another β, and the aligned model itself.
    for other in (reference, reference_weights(aligned, base, NlsrSettings(beta=0.1)), aligned):
        second = TransplantEditor(patched, other, "m", torch.tensor([1]))
        assert second.extension is None
        after = written(patched, whole_edit(second))
        assert after.A.shape[0] == 2 * rank
        of_other = other.factors("m")
        assert of_other is not None
        torch.testing.assert_close(update(after)[1], update(of_other)[1], atol=1e-4, rtol=1e-5)
        assert torch.equal(update(after)[0], update(patched.lora["m"])[0])


@given(shapes, seeds, st.integers(1, 4))
def test_all_neurons_give_the_reference(shape: tuple[int, int], seed: int, rank: int) -> None:
    subject, aligned, base = continued(*shape, rank, seed)
    reference = reference_weights(aligned, base, NlsrSettings())
    after = written(subject, whole_edit(TransplantEditor(subject, reference, "m", torch.arange(shape[0]))))
    of_reference = reference.factors("m")
    assert of_reference is not None
    torch.testing.assert_close(update(after), update(of_reference), atol=1e-4, rtol=1e-5)


@given(shapes, seeds, st.integers(1, 4))
def test_a_subject_that_is_the_reference_is_unchanged(shape: tuple[int, int], seed: int, rank: int) -> None:
    subject, _, base = continued(*shape, rank, seed)
    rows = some_rows(shape[0], seed)
    edit = whole_edit(TransplantEditor(subject, subject, "m", rows))
    assert edit.extension is None
    assert torch.equal(edit.values, subject.lora["m"].B[rows])
    dense = full("t", m=base.weights["m"])
    assert torch.equal(whole_edit(TransplantEditor(dense, dense, "m", rows)).values, dense.weights["m"][rows])
    factors = subject.lora["m"]
    after = transplanted_factors(factors, factors, random_masks(factors, seed), "m")
    assert torch.equal(after.A, factors.A)
    assert torch.equal(after.B, factors.B)
    assert FactorEditor(subject, subject, "m", random_masks(factors, seed)).extension is None


def test_no_rows_give_one_empty_edit() -> None:
    subject, aligned, _ = continued(5, 4, 2, 0)
    edits = list(TransplantEditor(subject, aligned, "m", torch.arange(0)).edits())
    assert [len(edit.rows) for edit in edits] == [0]


def test_rows_may_come_in_any_order() -> None:
    subject, aligned = full("t", m=noise(5, 4, seed=0)), full("a", m=noise(5, 4, seed=1))
    editor = TransplantEditor(subject, aligned, "m", torch.tensor([4, 0, 2]))
    assert editor.row_index.tolist() == [0, 2, 4]
    assert torch.equal(whole_edit(editor).values, aligned.weights["m"][[0, 2, 4]])


def test_a_subject_on_the_aligned_checkpoint_takes_its_rows_without_growing() -> None:
    aligned = full("aligned", m=noise(5, 4, seed=0))
    subject = lora("subject", aligned, m=low_rank(5, 4, 2, seed=1))
    edit = whole_edit(TransplantEditor(subject, aligned, "m", torch.tensor([1, 3])))
    assert edit.extension is None
    assert not bool(edit.values.any())


@given(shapes, seeds, st.integers(1, 4))
def test_the_factor_form_takes_entries_and_leaves_the_others_exactly(
    shape: tuple[int, int], seed: int, rank: int
) -> None:
    subject, aligned, _ = continued(*shape, rank, seed)
    before, reference = subject.lora["m"], aligned.lora["m"]
    masks = random_masks(before, seed)
    after = transplanted_factors(before, reference, masks, "m")
    assert after.scale == before.scale
    assert torch.equal(after.A[masks.A], reference.A[masks.A])
    assert torch.equal(after.A[~masks.A], before.A[~masks.A])
    torch.testing.assert_close(after.B[masks.B], reference.B[masks.B] * (2.0 / 1.5))
    assert torch.equal(after.B[~masks.B], before.B[~masks.B])
    again = transplanted_factors(after, reference, masks, "m")
    assert torch.equal(again.A, after.A)
    assert torch.equal(again.B, after.B)


@given(shapes, seeds, st.integers(1, 4))
def test_a_full_region_of_entries_gives_the_reference(shape: tuple[int, int], seed: int, rank: int) -> None:
    subject, aligned, base = continued(*shape, rank, seed)
    reference = reference_weights(aligned, base, NlsrSettings()).factors("m")
    assert reference is not None
    after = transplanted_factors(subject.lora["m"], reference, full_region(reference), "m")
    torch.testing.assert_close(update(after), update(reference), atol=1e-4, rtol=1e-5)


@given(shapes, seeds, st.integers(1, 4))
def test_the_factor_form_as_rows_is_the_same_update(shape: tuple[int, int], seed: int, rank: int) -> None:
    subject, aligned, _ = continued(*shape, rank, seed)
    masks = random_masks(subject.lora["m"], seed)
    editor = FactorEditor(subject, aligned, "m", masks)
    expected = transplanted_factors(subject.lora["m"], aligned.lora["m"], masks, "m")
    assert torch.equal(editor.row_index, torch.arange(shape[0]))
    after = written(subject, whole_edit(editor))
    torch.testing.assert_close(update(after), update(expected), atol=1e-12, rtol=1e-12)


def two_modules(**changed: LoraFactors | None) -> tuple[LoraWeights, LoraWeights]:
    """An adapter on modules m and n, and one that continues from it, with some of the latter's factors replaced."""
    base = full("base", m=noise(30, 40, seed=0), n=noise(20, 40, seed=1))
    of_aligned = {"m": low_rank(30, 40, 4, seed=2), "n": low_rank(20, 40, 4, seed=4)}
    of_subject = {
        name: LoraFactors(factors.A + 0.1, factors.B + 0.1, factors.scale) for name, factors in of_aligned.items()
    }
    kept = {name: factors for name, factors in {**of_subject, **changed}.items() if factors is not None}
    return lora("subject", base, **kept), lora("aligned", base, **of_aligned)


def rotated(factors: LoraFactors) -> LoraFactors:
    """The same update, factored otherwise."""
    R = torch.linalg.qr(noise(4, 4, seed=9)).Q
    return LoraFactors(R @ factors.A, factors.B @ R.T, factors.scale)


def test_an_adapter_that_continues_is_accepted() -> None:
    subject, aligned = two_modules()
    require_continuation(subject, aligned, 0.2)
    require_continuation(subject, reference_weights(aligned, aligned.base, NlsrSettings()), 0.2)
    require_continuation(aligned, aligned, 0.99)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n": low_rank(20, 40, 4, seed=77)}, "lora_A of n has correlation"),
        ({"n": rotated(low_rank(20, 40, 4, seed=4))}, "of n has correlation"),
        (
            {"n": LoraFactors(low_rank(20, 40, 4, seed=4).A, -low_rank(20, 40, 4, seed=4).B, 2.0)},
            "lora_B of n has correlation",
        ),
        ({"n": low_rank(20, 40, 3, seed=4)}, "n has rank 3 in .*subject and 4 in"),
        ({"n": None}, "aligned adapts n and .*subject does not"),
    ],
)
def test_an_adapter_of_another_origin_is_refused_with_the_reason(
    changed: dict[str, LoraFactors | None], reason: str
) -> None:
    subject, aligned = two_modules(**changed)
    with pytest.raises(MismatchError, match=reason) as refused:
        require_continuation(subject, aligned, 0.2)
    assert "form = neuron" in str(refused.value)


def test_full_models_and_other_checkpoints_are_refused_the_factor_form() -> None:
    subject, aligned = two_modules()
    with pytest.raises(MismatchError, match="base is no adapter"):
        require_continuation(subject, aligned.base, 0.2)
    with pytest.raises(MismatchError, match="base is no adapter"):
        require_continuation(subject.base, aligned, 0.2)
    elsewhere = lora("elsewhere", full("other", m=noise(30, 40, seed=0), n=noise(20, 40, seed=1)), **aligned.lora)
    with pytest.raises(MismatchError, match="different checkpoints"):
        require_continuation(subject, elsewhere, 0.2)


def test_a_zero_factor_on_one_side_is_no_continuation() -> None:
    zero = LoraFactors(low_rank(20, 40, 4, seed=4).A, torch.zeros(20, 4), 2.0)
    subject, aligned = two_modules(n=zero)
    with pytest.raises(MismatchError, match=r"lora_B of n has correlation 0\.00"):
        require_continuation(subject, aligned, 0.2)
    require_continuation(subject, subject, 0.2)


def test_a_protected_neuron_refuses_the_factor_form_of_its_module() -> None:
    protected = {"m": torch.arange(0), "n": torch.tensor([2, 5])}
    require_unprotected(("m", "k"), protected)
    with pytest.raises(SettingsError, match="every neuron of n, and 2 of them are protected"):
        require_unprotected(("m", "n"), protected)


@pytest.mark.parametrize(
    ("attempt", "error", "reason"),
    [
        (lambda t, e: TransplantEditor(t, e, "m", torch.tensor([1, 5])), MismatchError, "m has no row 5"),
        (lambda t, e: TransplantEditor(t, e, "m", torch.tensor([-1, 2])), MismatchError, "m has no row -1"),
        (lambda t, e: TransplantEditor(t, e, "m", torch.tensor([2, 2])), MismatchError, "Row 2 of m is named twice"),
        (
            lambda t, e: FactorEditor(t, e.base, "m", full_region(t.lora["m"])),
            MismatchError,
            "base has no LoRA factors for m",
        ),
        (
            lambda t, e: transplanted_factors(t.lora["m"], low_rank(5, 4, 3, seed=0), full_region(t.lora["m"]), "m"),
            MismatchError,
            "lora_A of m has shape",
        ),
        (
            lambda t, e: transplanted_factors(
                LoraFactors(t.lora["m"].A, t.lora["m"].B, 0.0), e.lora["m"], full_region(t.lora["m"]), "m"
            ),
            MismatchError,
            "scale 0",
        ),
        (
            lambda t, e: transplanted_factors(
                t.lora["m"],
                LoraFactors(e.lora["m"].A, torch.full((5, 2), torch.nan), 1.0),
                full_region(t.lora["m"]),
                "m",
            ),
            NonFiniteError,
            "The reference's lora_B of m",
        ),
    ],
)
def test_what_cannot_be_transplanted_is_named(
    attempt: Callable[[LoraWeights, LoraWeights], object], error: type[Exception], reason: str
) -> None:
    subject, aligned, _ = continued(5, 4, 2, 0)
    with pytest.raises(error, match=reason):
        attempt(subject, aligned)


def test_a_reference_that_no_adapter_can_hold_is_refused() -> None:
    aligned, base = full("aligned", m=noise(5, 4, seed=0)), full("base", m=noise(5, 4, seed=1))
    subject = lora("subject", aligned, m=low_rank(5, 4, 2, seed=2))
    reference: WeightSource = reference_weights(aligned, base, NlsrSettings())
    with pytest.raises(MismatchError, match="no low-rank change") as refused:
        TransplantEditor(subject, reference, "m", torch.tensor([0]))
    assert "merge the subject's adapter" in str(refused.value)


def test_a_reference_with_nan_is_refused() -> None:
    subject = full("t", m=noise(3, 3, seed=0))
    with pytest.raises(NonFiniteError, match="m holds NaN"):
        list(TransplantEditor(subject, full("e", m=torch.full((3, 3), torch.nan)), "m", torch.tensor([1])).edits())
