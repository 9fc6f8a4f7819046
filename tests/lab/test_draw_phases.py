"""The pictures of what each phase does show what the reports say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

import draw_phases
from semsharekv_integrations.model.loading import REFERENCE_MODEL

DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 60_000


@pytest.fixture(scope="module")
def calls() -> draw_phases.Calls:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_phases, "SIZE", 4)
        patch.setattr(draw_phases, "ORDER", (3, 0, 2, 1))
        patch.setattr(draw_phases, "BUDGETS", (0.3, 0.6))
        patch.setattr(draw_phases, "ANSWER_TOKENS", 6)
        return draw_phases.make_calls(REFERENCE_MODEL)


def test_each_call_shows_what_its_picture_is_about(calls: draw_phases.Calls) -> None:
    assert calls.first.reused_tokens == 0
    assert calls.again.prefix_tokens > 0.9 * calls.again.prompt_tokens
    assert all(report.identical_tokens > report.prefix_tokens for report in calls.moved.values())
    low, high = (calls.moved[budget].compute_ratio for budget in (0.3, 0.6))
    assert low < high < 1
    assert calls.kept.kv_retained_ratio < 1 == calls.moved[0.3].kv_retained_ratio
    places, moved = (draw_phases.find_places(each) for each in (calls.first, calls.moved[0.3]))
    assert places.keys() == moved.keys() and list(places) != list(moved)
    lengths = [stop - start for start, stop in places.values()]
    assert lengths == [use.tokens for use in calls.first.documents]


def test_every_token_is_drawn_in_the_colour_of_its_origin(calls: draw_phases.Calls) -> None:
    report = calls.moved[0.3]
    picture, plot = pyplot.subplots()
    draw_phases.draw_track(plot, 0.0, report, draw_phases.name_documents(calls))
    widths = {
        to_hex(shape.get_facecolor()): sum(four[:, 0].max() - four[:, 0].min() for four in corners_of(shape))
        for shape in plot.patches
        if isinstance(shape, PathPatch)
    }
    pyplot.close(picture)
    wanted = {
        "prefix": report.prefix_tokens,
        "identical": report.identical_tokens,
        "computed": report.recomputed_tokens,
    }
    assert widths == {draw_phases.COLOURS[name]: count for name, count in wanted.items() if count}


def corners_of(shape: PathPatch) -> list:
    return [polygon for polygon in shape.get_path().to_polygons(closed_only=False) if len(polygon) > 1]


def test_every_picture_is_drawn_and_small(calls: draw_phases.Calls, tmp_path: Path) -> None:
    drawn = draw_phases.draw(calls, tmp_path)
    assert [path.name for path in drawn] == [f"phase-{name}.png" for name in draw_phases.PICTURES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_page_shows_every_picture_in_words_too() -> None:
    page = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    for name in draw_phases.PICTURES:
        path = DOCS / "images" / f"phase-{name}.png"
        assert path.stat().st_size < MOST_BYTES, path
        before, shown, _ = page.partition(f"](images/{path.name})")
        assert shown and len(before.rpartition("![")[2]) > 40, f"{name} has no description"
