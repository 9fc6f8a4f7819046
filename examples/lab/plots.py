"""Plots of what ``drawn.py --out FILE.md``, ``lengths.py`` or a sweep measured; written beside its JSON, not shown.

    PYTHONPATH=. python examples/lab/plots.py results/reuse.json

Of drawn prompts there is one picture for each figure of quality, with a panel for each scenario. Points have 95%
intervals; lines are moved apart by a point or two, so that equal ones can be told apart. The dashed line is a full
prefill of the same cases, for agreement a second full prefill, which is the noise. The negative control, of which
nothing should be reused, is in the tables alone.

Of prompts at a length there are two: how many times faster the first token comes, by length and scenario; and the share
of a full prefill's time against the share of its compute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot, transforms
from matplotlib.figure import Figure as Picture

from drawn import CONTROLS, NEGATIVE_CONTROL
from lengths import split_name
from semsharekv_integrations.lab.figures import Estimate, Row
from semsharekv_integrations.lab.policies import FULL, POLICIES

matplotlib.use("Agg")
MOST_COLUMNS = 3
PANEL_INCHES = (4.6, 3.6)  # width, height
DOTS_PER_INCH = 130
SPEED_COLUMNS = 4
_APART_INCHES = 1.5 / 72  # between lines
_MARKERS, _SPEED_MARKERS = "osD^vP*Xhdp<>", "osD^vPX*<>"
QUANTITIES = {  # file name: figure and its label
    "accuracy": ("accuracy", "answer accuracy"),
    "agreement": ("agreement", "agreement with full prefill"),
    "rouge": ("rouge_l", "ROUGE-L"),
    "recall": ("lsh_recall", "LSH recall"),
}


class Axis(NamedTuple):
    """What a plot shows from left to right, which rows form a line, and which stand in one panel.

    ``x`` is None for rows that have no place on it.
    """

    label: str
    x: Callable[[Row], float | None]
    series: Callable[[Row], str]
    panel: Callable[[Row], str] = lambda row: row.scenario
    is_logarithmic: bool = False


def read_compute(row: Row) -> float | None:
    """The median compute ratio."""
    found = row["compute_ratio"]
    return None if found is None else found.value


BY_COMPUTE = Axis("compute ratio (median)", read_compute, lambda row: row.policy)


class _Point(NamedTuple):
    x: float
    y: Estimate


def draw_answers(rows: Sequence[Row], title: str, axis: Axis, out: Path) -> list[Path]:
    """Write one picture beside ``out`` for each quantity that the rows have; where they are.

    Args:
        rows: of one study.
        title: of the study.
        axis: what goes where.
        out: a file whose name, without its ending, the pictures' names begin with.
    """
    drawn = []
    for name, (figure, label) in QUANTITIES.items():
        panels = _place_points(rows, axis, figure)
        if panels:
            path = out.with_name(f"{out.stem}.{name}.png")
            _draw_panels(panels, rows, title, axis, figure, label).savefig(path, dpi=DOTS_PER_INCH)
            drawn.append(path)
    return drawn


def _place_points(rows: Sequence[Row], axis: Axis, figure: str) -> dict[str, dict[str, list[_Point]]]:
    """Points by panel and series, from left to right; controls are no points."""
    panels: dict[str, dict[str, list[_Point]]] = {}
    for row in rows:
        x, y = axis.x(row), row[figure]
        if x is not None and y is not None and not _is_control(row):
            panels.setdefault(axis.panel(row), {}).setdefault(axis.series(row), []).append(_Point(x, y))
    return {name: {key: sorted(points) for key, points in lines.items()} for name, lines in panels.items()}


def _is_control(row: Row) -> bool:
    is_plain = row.policy in POLICIES and POLICIES[row.policy].reuse.mode in CONTROLS
    return is_plain or row.scenario.startswith(NEGATIVE_CONTROL)


def _draw_panels(
    panels: dict[str, dict[str, list[_Point]]], rows: Sequence[Row], title: str, axis: Axis, figure: str, label: str
) -> Picture:
    columns = min(len(panels), MOST_COLUMNS)
    height = ceil(len(panels) / columns)
    width, inches = PANEL_INCHES
    picture = Picture(figsize=(max(width * columns, 1.4 * width), inches * height + 1.3), layout="constrained")
    grid = list(picture.subplots(height, columns, squeeze=False, sharex=True, sharey=True).flat)
    series = list(dict.fromkeys(axis.series(row) for row in rows if axis.x(row) is not None and not _is_control(row)))
    for plot, (name, lines) in zip(grid, panels.items(), strict=False):
        _draw_panel(plot, name, lines, series, axis)
        _draw_baseline(plot, [row for row in rows if axis.panel(row) == name], axis, figure)
    if not axis.is_logarithmic:  # shares from none on, so that near ones look near
        grid[0].set_xlim(left=min(0.0, grid[0].get_xlim()[0]))
    for plot in grid[::columns]:
        plot.set_ylabel(label)
    for plot in grid[len(panels) :]:
        plot.set_visible(False)
    found = [plot.get_legend_handles_labels() for plot in picture.axes]
    handles = {text: handle for pair in found for handle, text in zip(*pair, strict=True)}
    at = {"loc": "outside lower center", "ncols": min(5, len(handles)), "frameon": False}
    picture.legend(handles.values(), handles.keys(), **at)
    picture.suptitle(title)
    return picture


def _draw_panel(plot: Any, name: str, lines: dict[str, list[_Point]], series: Sequence[str], axis: Axis) -> None:
    if axis.is_logarithmic:
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:g}")
    for label, points in lines.items():
        at = series.index(label)
        x, y = [point.x for point in points], [point.y.value for point in points]
        spread = [[max(0.0, p.y.value - p.y.low) for p in points], [max(0.0, p.y.high - p.y.value) for p in points]]
        style = {"marker": _MARKERS[at % len(_MARKERS)], "color": f"C{at % 10}", "markersize": 5, "linewidth": 1.2}
        where = _move_aside(plot, at - (len(series) - 1) / 2)
        plot.errorbar(x, y, yerr=spread, label=label, capsize=2, elinewidth=0.8, transform=where, **style)
        plot.update_datalim([(p.x, end) for p in points for end in (p.y.low, p.y.high)])
    plot.autoscale_view()
    plot.set_title(name, fontsize=10)
    plot.set_xlabel(axis.label)
    plot.tick_params(labelbottom=True)
    plot.grid(alpha=0.25)


def _move_aside(plot: Any, steps: float) -> Any:
    """Where data stands, moved to the right by as many steps."""
    move = transforms.ScaledTranslation(steps * _APART_INCHES, 0, plot.figure.dpi_scale_trans)
    return plot.transData + move


def _draw_baseline(plot: Any, rows: Sequence[Row], axis: Axis, figure: str) -> None:
    """A dashed line: level where the panel is of one workload, else along the axis."""
    named = "rerun" if figure == "agreement" else FULL
    found = [(axis.x(row), value) for row in rows if row.policy == named and (value := row[figure]) is not None]
    style = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 0}
    label = "full prefill again" if named == "rerun" else "full prefill"
    if len(found) == 1:
        plot.axhline(found[0][1].value, label=label, **style)
    elif found:
        points = sorted((x, value.value) for x, value in found if x is not None)
        plot.plot([x for x, _ in points], [y for _, y in points], label=label, **style)


def draw_speed(rows: Sequence[Row], title: str, beside: Path) -> list[Path]:
    """Write both plots beside ``beside``, under its name; those for which there is nothing to draw are left out."""
    measured = [row for row in rows if _read_length(row) and row["ttft_ratio"] is not None and row.policy != FULL]
    drawn = []
    if measured:
        drawn.append(_save(_draw_speedups(measured, title), beside, "speedup"))
    told = [row for row in measured if row["compute_ratio"] is not None]
    if told:
        drawn.append(_save(_draw_shares(told, title), beside, "shares"))
    return drawn


def _save(figure: Any, beside: Path, name: str) -> Path:
    path = beside.with_name(f"{beside.stem}-{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _draw_speedups(rows: Sequence[Row], title: str) -> Any:
    """One panel for each scenario, one line for each policy, with its quartiles."""
    scenarios = list(dict.fromkeys(split_name(row.scenario)[0] for row in rows))
    columns = min(SPEED_COLUMNS, len(scenarios))
    height = -(-len(scenarios) // columns)
    figure, grid = pyplot.subplots(
        height, columns, figsize=(3.4 * columns, 3 * height), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, scenario in zip(grid.flat, scenarios, strict=False):
        shown = [row for row in rows if split_name(row.scenario)[0] == scenario]
        _draw_speedup_panel(panel, shown, _choose_styles(rows))
        panel.set_title(scenario)
    for panel in list(grid.flat)[len(scenarios) :]:
        panel.set_visible(False)
    figure.suptitle(f"Time to first token, times faster than off\n{title}", fontsize=11)
    handles = {name: line for panel in grid.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7))
    return figure


def _draw_speedup_panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted((row for row in rows if row.policy == policy), key=_read_length)
        spreads = [row.figures["ttft_ratio"] for row in points]
        tokens = [row.figures["prompt_tokens"].value for row in points]
        values = [spread.value for spread in spreads]
        reach = [[s.value - s.low for s in spreads], [s.high - s.value for s in spreads]]
        panel.errorbar(tokens, values, yerr=reach, label=policy, capsize=2, markersize=4, **styles[policy])
    lengths = sorted(set(map(_read_length, rows)))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    panel.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.axhline(1, color="black", linewidth=1, linestyle=":")
    panel.grid(alpha=0.3)
    panel.set_xlabel("prompt tokens")


def _read_length(row: Row) -> int:
    return split_name(row.scenario)[1] or 0


def _draw_shares(rows: Sequence[Row], title: str) -> Any:
    """Every row as a point: what it computed against what it took. On the diagonal there is no overhead."""
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    policies, colours = _choose_styles(rows), pyplot.get_cmap("tab10")
    for number, scenario in enumerate(dict.fromkeys(split_name(row.scenario)[0] for row in rows)):
        for policy, style in policies.items():
            points = [row for row in rows if split_name(row.scenario)[0] == scenario and row.policy == policy]
            x = [row.figures["compute_ratio"].value for row in points]
            y = [1 / row.figures["ttft_ratio"].value for row in points]
            axes.scatter(x, y, color=colours(number), marker=style["marker"], alpha=0.8, s=34)
        axes.scatter([], [], color=colours(number), label=scenario)
    for policy, style in policies.items():
        axes.scatter([], [], color="black", marker=style["marker"], label=policy)
    axes.axline((0.5, 0.5), slope=1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlabel("compute share: token-layers computed over all")
    axes.set_ylabel("time share: TTFT over that of off")
    axes.set_title(f"Overhead is the height above the line\n{title}", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    return figure


def _choose_styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker by policy, the same in every panel."""
    names = dict.fromkeys(row.policy for row in rows)
    return {name: {"color": f"C{index}", "marker": _SPEED_MARKERS[index % 10]} for index, name in enumerate(names)}


def read_rows(path: Path) -> tuple[str, list[Row]]:
    """Title and rows of a JSON file."""
    written = json.loads(path.read_text())
    return written["title"], [
        Row(**row | {"figures": {name: Estimate(*found) for name, found in row["figures"].items()}})
        for row in written["rows"]
    ]


def main(paths: Sequence[str] | None = None) -> None:
    """Draw each file."""
    for path in map(Path, sys.argv[1:] if paths is None else paths):
        title, rows = read_rows(path)
        drawn = draw_answers([row for row in rows if not _read_length(row)], title, BY_COMPUTE, path)
        print(*drawn, *draw_speed(rows, title, path), sep="\n")


if __name__ == "__main__":
    main()
