"""The benchmark of identification compares ways that find the same thing."""

from pathlib import Path

import pytest
import torch
from identification import NoWeights, main, published

from algorithms import nlsr
from algorithms.calibration import CalibrationItem
from algorithms.loading import load_model
from algorithms.nlsr_settings import NlsrSettings
from algorithms.weights import open_weights
from tests.tiny_models import quiet, save_adapter, save_model


def _items() -> list[CalibrationItem]:
    drawn = torch.randint(4, 60, (6, 20), generator=torch.Generator().manual_seed(3))
    lengths = (20, 17, 20, 12, 15, 20)
    return [
        CalibrationItem(tuple(row[:length].tolist()), tuple(place >= 6 for place in range(length)), 6)
        for row, length in zip(drawn, lengths, strict=True)
    ]


@pytest.mark.parametrize("full", [True, False], ids=["whole weights", "factors"])
def test_the_published_way_reduces_to_what_identification_ranks_by(tmp_path: Path, full: bool) -> None:
    base = save_model(tmp_path / "base")
    under = open_weights(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    source = under if full else open_weights(adapter, base)
    settings = NlsrSettings(selection="all", form="neuron" if full else "factor", sparsity=0.5, gram_dtype="float64")
    with quiet():
        model, _ = load_model(*((base,) if full else (adapter, base)))
    torch.manual_seed(0)
    reduced = published(model, source, _items(), settings, 0, iterations=500)
    found = nlsr.identify(
        source,
        source,
        NoWeights(under) if full else under,
        source,
        load=lambda _: model,
        safe=_items(),
        pad_id=0,
        settings=settings,
    )
    assert len(found.modules) == len(under.modules)
    for module in found.modules:
        if full:
            torch.testing.assert_close(reduced[module.module].norm(dim=1), module.scores, atol=1e-3, rtol=1e-3)
            continue
        assert module.masks is not None
        for name, mask in (("A", module.masks.A), ("B", module.masks.B)):
            largest = reduced[f"{module.module}.{name}"].abs()
            assert largest[mask].min() >= largest[~mask].max() - 1e-4


def test_it_measures_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model(tmp_path / "base")
    arguments = ["--model", str(base), "--answers", "4", "--answer-tokens", "4", "--full"]
    assert main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == ["plain", "neuron", "published"]
    assert (tmp_path / "figures.json").is_file()
