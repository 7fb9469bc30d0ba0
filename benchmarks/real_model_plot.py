"""The frontier of a real-model benchmark, drawn from its JSON document: recovery against share modified."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_model_summary import last_recovery, modified_share

from neuronledger import NeuronLedgerError

# Colours that stay apart in grey and for colour-blind readers (Okabe and Ito); markers say the same once more.
_STYLES = {
    "ours": ("#0072B2", "o", "ours"),
    "published": ("#D55E00", "s", "as published"),
    "baseline": ("#009E73", "D", "baselines"),
    "control": ("#767676", "x", "controls"),
}
_TITLES = {"seen": "Kinds identified with", "unseen": "Kinds never seen"}


_LINE = 0.045
"""Height of a name, in recovery."""
_NEAR = 25
"""Names of points that are less apart than this share, in %, could meet."""


class PlotError(NeuronLedgerError):
    """The plot cannot be drawn."""


def draw_frontier(document: Mapping[str, Any], file: Path) -> None:
    """Write an SVG: one panel for kinds identified with, one for kinds never seen.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise PlotError(
            "The plot needs matplotlib, which is not installed", "Install neuronledger[benchmarks]"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # The same document gives the same bytes: text stays text, names of parts don't depend on the time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 9, "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.6), sharey=True, layout="constrained")
        for panel, (kinds, title) in zip(panels, _TITLES.items(), strict=True):
            _panel(panel, document, kinds)
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("linear parameters modified, %")
        panels[0].set_ylabel("recovery of safety")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _panel(panel: Any, document: Mapping[str, Any], kinds: str) -> None:
    panel.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    panel.axhline(0, color="#999999", linewidth=0.8)
    best = set(document["frontier"][kinds])
    corner: list[tuple[float, float]] = []
    named: list[tuple[float, float, str]] = []
    for family, (colour, marker, label) in _STYLES.items():
        shown = label
        for run in document["runs"]:
            found = last_recovery(run, kinds)
            if run["family"] != family or found is None:
                continue
            share = modified_share(run)
            below, above = max(0.0, found["value"] - found["low"]), max(0.0, found["high"] - found["value"])
            main = run["part"] == "main"
            panel.errorbar(
                *([share], [found["value"]]),
                yerr=[[below], [above]],
                fmt=marker,
                color=colour,
                markersize=6 if main else 3.5,
                alpha=1 if main else 0.55,
                elinewidth=0.8,
                capsize=2 if main else 0,
                label=shown,
            )
            shown = "_"
            if main:
                named.append((share, found["value"], run["name"]))
            if run["name"] in best:
                corner.append((share, found["value"]))
    if corner:
        xs, ys = zip(*sorted(corner), strict=True)
        panel.step([*xs, 102], [*ys, ys[-1]], where="post", color="#333333", linewidth=1, label="nothing beats")
    _name(panel, named)
    panel.set_xlim(-2, 103)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _name(panel: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points (share, recovery, name), those of near points one below the other."""
    placed: list[tuple[float, float]] = []
    for share, value, name in sorted(points, key=lambda point: (-point[1], point[0])):
        height = value + _LINE / 3
        for other, line in placed:
            if abs(share - other) < _NEAR:
                height = min(height, line - _LINE)
        placed.append((share, height))
        left = share > 80
        panel.annotate(
            name,
            (share, height),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            fontsize=7,
            ha="right" if left else "left",
            va="center",
        )
