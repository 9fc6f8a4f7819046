"""Plots of the speed bench: speed-up against length for each scenario, and time share against compute share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semsharekv_integrations.lab.extra import imported
from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.speed_figures import Row

MARKERS = "osD^vPX*<>"
NUM_COLUMNS = 4


def pyplot() -> Any:
    """Matplotlib's interface, without a display.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    purpose = "plotting (leave it out with --no-plots)"
    imported("matplotlib", purpose).use("Agg")
    return imported("matplotlib.pyplot", purpose)


def draw(rows: Sequence[Row], title: str, beside: Path) -> list[Path]:
    """Write both plots beside ``beside``, under its name; those for which there is nothing to draw are left out."""
    plt = pyplot()
    measured = [row for row in rows if row.speedup is not None and row.policy != FULL]
    drawn = []
    if measured:
        drawn.append(_saved(plt, _speedups(plt, measured, title), beside, "speedup"))
    told = [row for row in measured if row.compute_ratio is not None]
    if told:
        drawn.append(_saved(plt, _shares(plt, told, title), beside, "shares"))
    return drawn


def _saved(plt: Any, figure: Any, beside: Path, name: str) -> Path:
    path = beside.with_name(f"{beside.stem}-{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def _speedups(plt: Any, rows: Sequence[Row], title: str) -> Any:
    """One panel for each scenario, one line for each policy, with its quartiles."""
    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    columns = min(NUM_COLUMNS, len(scenarios))
    height = -(-len(scenarios) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(3.4 * columns, 3 * height), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, scenario in zip(grid.flat, scenarios, strict=False):
        _speedup_panel(panel, [row for row in rows if row.scenario == scenario], _styles(rows))
        panel.set_title(scenario)
    for panel in list(grid.flat)[len(scenarios) :]:
        panel.set_visible(False)
    figure.suptitle(f"Time to first token, times faster than off\n{title}", fontsize=11)
    handles = {name: line for panel in grid.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7))
    return figure


def _speedup_panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted((row for row in rows if row.policy == policy), key=lambda row: row.length)
        spreads = [row.speedup for row in points if row.speedup is not None]
        tokens = [row.prompt_tokens for row in points]
        values = [spread.value for spread in spreads]
        reach = [[s.value - s.low for s in spreads], [s.high - s.value for s in spreads]]
        panel.errorbar(tokens, values, yerr=reach, label=policy, capsize=2, markersize=4, **styles[policy])
    lengths = sorted({row.length for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    panel.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.axhline(1, color="black", linewidth=1, linestyle=":")
    panel.grid(alpha=0.3)
    panel.set_xlabel("prompt tokens")


def _shares(plt: Any, rows: Sequence[Row], title: str) -> Any:
    """Every row as a point: what it computed against what it took. On the diagonal there is no overhead."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    policies, colours = _styles(rows), plt.get_cmap("tab10")
    for number, scenario in enumerate(dict.fromkeys(row.scenario for row in rows)):
        for policy, style in policies.items():
            points = [row for row in rows if row.scenario == scenario and row.policy == policy and row.speedup]
            x = [row.compute_ratio for row in points]
            y = [1 / row.speedup.value for row in points if row.speedup]
            axes.scatter(x, y, color=colours(number), marker=style["marker"], alpha=0.8, s=34)
        axes.scatter([], [], color=colours(number), label=scenario)
    for policy, style in policies.items():
        axes.scatter([], [], color="black", marker=style["marker"], label=policy)
    axes.axline((0.5, 0.5), slope=1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
    axes.set_xlabel("compute share: token-layers computed over all")
    axes.set_ylabel("time share: TTFT over that of off")
    axes.set_title(f"Overhead is the height above the line\n{title}", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker by policy, the same in every panel."""
    names = dict.fromkeys(row.policy for row in rows)
    return {name: {"color": f"C{index}", "marker": MARKERS[index % 10]} for index, name in enumerate(names)}
