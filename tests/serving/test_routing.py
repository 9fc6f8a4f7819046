"""A request goes to the replica that holds most of its content, as small sketches tell it, unless others wait less."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.serving.routing import (
    MOST_REMEMBERED,
    NOTHING,
    SKETCH_BYTES,
    WINDOW,
    Candidate,
    Holdings,
    Router,
    Sketch,
    join_marks,
    mark_text,
    sketch_marks,
)

WORDS = [f"{first}{second}" for first in ("ba", "ko", "mu", "ri", "te") for second in ("lan", "vor", "sim", "dek")]
CHARS = 4000  # of a document


def write(seed: int, chars: int = CHARS) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(chars // 6))


def hold(*seeds: int, tenant: str = "t", most_bytes: int = SKETCH_BYTES) -> Sketch:
    return sketch_marks(join_marks(mark_text(write(seed), tenant) for seed in seeds), most_bytes)


def test_a_score_is_the_share_that_is_held_wherever_it_stands() -> None:
    held = hold(1, 2, 3)
    assert held.score(mark_text(write(2), "t")) == 1
    assert held.score(mark_text(write(9), "t")) == 0
    moved = f"Read what follows.\n\n{write(3)}\n\n{write(1)}\n\nWhat does it say?"
    assert held.score(mark_text(moved, "t")) > 0.95
    half = f"{write(1)}\n\n{write(8)}"
    assert held.score(mark_text(half, "t")) == pytest.approx(0.5, abs=0.1)


def test_blanks_make_no_difference() -> None:
    text = write(1)
    other = "\n" + text.replace(" ", "  \n\t", 300) + " "
    assert mark_text(other, "t").marks.tolist() == mark_text(text, "t").marks.tolist()


@given(st.text(max_size=4 * WINDOW), st.text(max_size=300))
def test_any_text_can_be_marked_and_holds_itself(text: str, more: str) -> None:
    marks = mark_text(text, "t")
    assert (np.diff(marks.orders.astype(np.int64)) >= 0).all()
    whole = sketch_marks(join_marks([marks, mark_text(more, "t")]))
    assert whole.score(marks) == (1.0 if len(marks.marks) else 0.0)
    assert len(" ".join(text.split())) >= WINDOW or not len(marks.marks)


def test_texts_without_blanks_are_known_too() -> None:
    text = "".join(chr(0x4E00 + n * 37 % 5000) for n in range(3000))
    assert sketch_marks(mark_text(text, "t")).score(mark_text("又" + text[500:2500], "t")) > 0.9


def test_what_one_tenant_stores_draws_nothing_of_another() -> None:
    assert hold(1, tenant="one").score(mark_text(write(1), "another")) == 0


@pytest.mark.parametrize("most_bytes", [8, 11, 12, 100, 4096, SKETCH_BYTES])
@pytest.mark.parametrize("documents", [0, 1, 20, 300])
def test_a_sketch_is_never_larger_than_its_bound(most_bytes: int, documents: int) -> None:
    sketch = hold(*range(documents), most_bytes=most_bytes)
    assert len(sketch.to_bytes()) <= most_bytes
    again = Sketch.from_bytes(sketch.to_bytes())
    assert again.stop == sketch.stop and again.marks.tolist() == sketch.marks.tolist()


def test_a_small_sketch_of_much_still_tells_what_is_held() -> None:
    """Fewer windows count, so a score is rougher, but what is held and what is not stay apart."""
    sketch = hold(*range(100), most_bytes=4096)
    held = [sketch.score(mark_text(write(seed), "t")) for seed in range(100)]
    other = [sketch.score(mark_text(write(seed), "t")) for seed in range(1000, 1100)]
    assert sum(score == 1 for score in held) > 95 and max(other) == 0


@pytest.mark.parametrize("told", [b"", b"1234567", b"123456789"])
def test_what_is_no_sketch_is_refused(told: bytes) -> None:
    with pytest.raises(ValueError, match="a sketch has"):
        Sketch.from_bytes(told)


def test_what_is_no_longer_held_leaves_the_sketch() -> None:
    holdings = Holdings()
    for seed in range(3):
        holdings.put(str(seed), mark_text(write(seed), "t"))
    holdings.keep_only(["0", "2", "none"])
    assert [holdings.sketch().score(mark_text(write(seed), "t")) for seed in range(3)] == [1, 0, 1]
    assert ("0" in holdings, "1" in holdings) == (True, False)


def candidates(*queues: int, **held: Sketch) -> list[Candidate]:
    return [Candidate(str(n), queue, held.get(f"r{n}", NOTHING)) for n, queue in enumerate(queues)]


def test_the_holder_is_first_until_its_queue_costs_more_than_computing() -> None:
    router, marks = Router(seed=1), mark_text(write(1), "t")
    for queue in range(8):
        first = router.rank(candidates(0, queue, 0, 0, r1=hold(1)), marks)[0]
        assert (first == "1") == (queue <= 4), queue  # a whole prefill, where it takes no room from others


def test_of_two_holders_the_one_with_more_or_with_less_to_do_is_first() -> None:
    router = Router(seed=1)
    prompt = mark_text(f"{write(1)}\n\n{write(2)}", "t")
    assert router.rank(candidates(0, 0, 0, r0=hold(1), r2=hold(1, 2)), prompt)[0] == "2"
    assert router.rank(candidates(2, 1, 1, r0=hold(1, 2), r1=hold(1, 2)), prompt)[0] == "1"


def test_what_nobody_holds_is_spread_and_shuns_queues() -> None:
    router = Router(seed=1)
    firsts = Counter(router.rank(candidates(*[0] * 8), mark_text(write(n), "t"))[0] for n in range(400))
    assert len(firsts) == 8 and max(firsts.values()) < 2 * min(firsts.values())
    assert all(router.rank(candidates(0, 9), mark_text(write(n), "t"))[0] == "0" for n in range(20))


def test_what_everybody_holds_is_spread_too() -> None:
    router, held = Router(seed=1), hold(1)
    all_hold = candidates(*[0] * 4, r0=held, r1=held, r2=held, r3=held)
    firsts = Counter(router.rank(all_hold, mark_text(write(1), "t"))[0] for _ in range(400))
    assert len(firsts) == 4 and max(firsts.values()) < 2 * min(firsts.values())


def test_prompts_that_begin_alike_do_not_all_go_where_the_first_one_went() -> None:
    """One after another, without queues: each set keeps its replica, and each replica has a share of the sets."""
    router, preamble = Router(seed=1), write(999, CHARS // 2)
    sets = [mark_text(f"{preamble}\n\n{write(seed)}", "t") for seed in range(12)]
    places: dict[int, set[str]] = {n: set() for n in range(12)}
    for _ in range(5):
        for number, marks in enumerate(sets):
            first = router.rank(candidates(0, 0), marks)[0]
            router.note(first, marks)
            places[number].add(first)
    assert all(len(places[number]) == 1 for number in places), "a set moved"
    shares = Counter(place for found in places.values() for place in found)
    assert min(shares["0"], shares["1"]) >= 4


def test_what_was_sent_is_known_before_a_sketch_shows_it() -> None:
    router, marks = Router(seed=1), mark_text(write(1), "t")
    router.note("2", marks)
    for _ in range(2):
        assert router.rank(candidates(0, 0, 0, 0), marks)[0] == "2"
        router.refresh("2")
    firsts = {router.rank(candidates(0, 0, 0, 0), marks)[0] for _ in range(50)}
    assert len(firsts) > 1, "two sketches that do not show it: it is not held"


def test_what_is_remembered_is_bounded() -> None:
    router = Router(seed=1)
    for seed in range(MOST_REMEMBERED + 1):
        router.note("1", mark_text(write(seed), "t"))
    assert {router.rank(candidates(0, 0, 0), mark_text(write(0), "t"))[0] for _ in range(50)} != {"1"}
    assert {router.rank(candidates(0, 0, 0), mark_text(write(1), "t"))[0] for _ in range(50)} == {"1"}
    router.keep_only(["0", "2"])
    assert {router.rank(candidates(0, 0, 0), mark_text(write(1), "t"))[0] for _ in range(50)} != {"1"}


def test_requests_without_content_push_nothing_out() -> None:
    """As probes of health and scrapes of metrics come."""
    router, marks = Router(seed=1), mark_text(write(1), "t")
    router.note("1", marks)
    for _ in range(MOST_REMEMBERED):
        router.note("1", mark_text("", "t"))
    assert {router.rank(candidates(0, 0, 0), marks)[0] for _ in range(50)} == {"1"}


def test_nobody_and_nothing_are_no_errors() -> None:
    router = Router(seed=1)
    assert router.rank([], mark_text(write(1), "t")) == []
    assert router.rank(candidates(3), mark_text("", "t")) == ["0"]
    assert sorted(router.rank(candidates(0, 0), mark_text("short", "t"))) == ["0", "1"]
