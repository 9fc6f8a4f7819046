"""Runs of identical tokens against a quadratic matcher, under collisions too, while sequences come and go."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semsharekv_integrations.kv import count_common_tokens
from semsharekv_integrations.store import runs
from semsharekv_integrations.store.runs import (
    MAX_CANDIDATES,
    IndexedRun,
    RunIndex,
    common_extension_tokens,
    order_windows,
    window_hashes,
)

Tokens = list[int]
MIN = 3


def ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def token_lists(max_token: int, max_size: int) -> st.SearchStrategy[Tokens]:
    return st.lists(st.integers(0, max_token), max_size=max_size)


def index_of(*sequences: Tokens, min_run_tokens: int = MIN) -> RunIndex:
    index = RunIndex(min_run_tokens)
    for n, sequence in enumerate(sequences):
        index.add(str(n), ids(sequence))
        index.check()
    return index


def agreeing(prompt: Tokens, start: int, sequence: Tokens, source_start: int) -> int:
    pairs = zip(prompt[start:], sequence[source_start:], strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(prompt) - start, len(sequence) - source_start))


def assert_true(found: list[IndexedRun], prompt: Tokens, sequences: dict[str, Tokens]) -> None:
    """Every run is there, as long as it can be, long enough, in order and without overlap."""
    for run in found:
        assert run.num_tokens == agreeing(prompt, run.start, sequences[run.key], run.source_start) >= MIN
    for one, after in pairwise(found):
        assert one.start + one.num_tokens <= after.start


def assert_complete(found: list[IndexedRun], prompt: Tokens, sequences: dict[str, Tokens]) -> None:
    """Every window that occurs in a sequence starts inside a run, and each run is the longest at its start.

    The latter where a window has no more occurrences than are compared, none of which overlap.
    """
    covered = {at for run in found for at in range(run.start, run.start + run.num_tokens)}
    lengths = {run.start: run.num_tokens for run in found}
    for start in range(len(prompt) - MIN + 1):
        places = {
            (key, at): agreeing(prompt, start, sequence, at)
            for key, sequence in sequences.items()
            for at in range(len(sequence))
        }
        occurrences = {place: num for place, num in places.items() if num >= MIN}
        assert start in covered or not occurrences
        apart = not any((key, at + shift) in occurrences for key, at in occurrences for shift in range(1, MIN))
        if start in lengths and len(occurrences) <= MAX_CANDIDATES and apart:
            assert lengths[start] == max(occurrences.values())


@settings(max_examples=300)
@given(st.lists(token_lists(2, 20), max_size=5), token_lists(2, 30))
def test_runs_are_those_of_a_quadratic_matcher(stored: list[Tokens], prompt: Tokens) -> None:
    sequences = {str(n): sequence for n, sequence in enumerate(stored)}
    found = index_of(*stored).find(ids(prompt))
    assert_true(found, prompt, sequences)
    assert_complete(found, prompt, sequences)


@pytest.mark.parametrize("modulus", [1, 2, 7])
@settings(max_examples=100)
@given(stored=st.lists(token_lists(2, 20), max_size=4), prompt=token_lists(2, 30))
def test_a_hash_collision_is_never_a_run(modulus: int, stored: list[Tokens], prompt: Tokens) -> None:
    def colliding(token_ids: np.ndarray, num_tokens: int) -> np.ndarray:
        return window_hashes(token_ids, num_tokens) % np.uint64(modulus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "window_hashes", colliding)
        found = index_of(*stored).find(ids(prompt))
    assert_true(found, prompt, {str(n): sequence for n, sequence in enumerate(stored)})


def test_under_collisions_runs_are_still_found() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "window_hashes", lambda t, n: window_hashes(t, n) % np.uint64(5))
        index = index_of([1, 2, 3, 4, 5], [9, 8, 7, 6])
        assert [(run.key, run.num_tokens) for run in index.find(ids([0, 9, 8, 7, 0, 3, 4, 5]))] == [("1", 3), ("0", 3)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), token_lists(2, 14)), max_size=20), st.data())
def test_sequences_come_and_go(steps: list[tuple[bool, Tokens]], data: st.DataObject) -> None:
    index, sequences = RunIndex(MIN), dict[str, Tokens]()
    for n, (adds, tokens) in enumerate(steps):
        if adds or not sequences:
            sequences[str(n)] = tokens
            index.add(str(n), ids(tokens))
        else:
            key = data.draw(st.sampled_from(sorted(sequences)))
            del sequences[key]
            index.remove(key)
        index.check()
        prompt = data.draw(token_lists(2, 14))
        found = index.find(ids(prompt))
        assert_true(found, prompt, sequences)
        assert_complete(found, prompt, sequences)


def test_removed_windows_do_not_pile_up_nor_hide_living_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SCANNED_AT_ONCE", 4)
    text = list(range(50))
    index = index_of(text)
    for n in range(1, 200):
        index.add(f"later {n}", ids(text))
        if n > 20:
            index.remove(f"later {n - 20}")
    for n in range(180, 200):
        index.remove(f"later {n}")
    index.check()
    assert index.find(ids(text)) == [IndexedRun(0, "0", 0, 50)]
    index.remove("0")
    assert index.num_windows == 0 and index.find(ids(text)) == [] and index.keys == set()


def test_shuffled_documents_all_match() -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 50, size).tolist() for size in (40, 71, 5, 160, 33)]
    stored = [[token for document in part for token in document] for part in (documents[:3], documents[3:])]
    index = index_of(*stored, min_run_tokens=5)
    order = [3, 0, 4, 1, 2, 3]  # one of them twice
    prompt = [token for n in order for token in [50 + n, *documents[n]]]
    found = index.find(ids(prompt))
    assert [run.num_tokens for run in found] == [len(documents[n]) for n in order]
    assert [run.key for run in found] == ["0" if n < 3 else "1" for n in order]


def test_a_run_goes_on_in_its_source_after_a_change() -> None:
    rng = np.random.default_rng(4)
    head, tail = (rng.integers(0, 90, size).tolist() for size in (20, 30))
    for change in ([99], [], [99, 98, 97]):  # a token for another, one less, two more
        newer = [[n, n + 1, *tail] for n in range(100, 100 + 2 * MAX_CANDIDATES)]
        found = index_of([*head, 95, *tail], *newer).find(ids([*head, *change, *tail]))
        assert [(run.key, run.num_tokens) for run in found] == [("0", 20), ("0", 30)]


def test_a_run_goes_on_in_the_middle_of_a_stretch_that_repeats_itself() -> None:
    found = index_of([1, *[7] * 50, 2, 3, 4]).find(ids([1, *[7] * 20, 9, *[7] * 29, 2, 3, 4]))
    assert [(run.start, run.num_tokens) for run in found] == [(0, 21), (22, 32)]


def test_of_equal_occurrences_the_latest_is_taken_and_of_others_the_longest() -> None:
    index = index_of([1, 2, 3, 4], [9, 1, 2, 3], [8, 1, 2, 3])
    assert index.find(ids([1, 2, 3])) == [IndexedRun(0, "2", 1, 3)]
    assert index.find(ids([1, 2, 3, 4])) == [IndexedRun(0, "0", 0, 4)]


def test_text_that_repeats_itself_matches_as_a_whole() -> None:
    for repeated in ([7] * 200, [7, 8] * 100, [5, 5, 6] * 50):
        index = index_of([1, *repeated, 2], min_run_tokens=4)
        assert index.find(ids([3, *repeated, 2])) == [IndexedRun(1, "0", 1, len(repeated) + 1)]
        assert index.num_windows < 9, "one window stands for a stretch"


@given(token_lists(2, 20), st.integers(1, 6))
def test_window_hashes_depend_on_their_window_alone(tokens: Tokens, num_tokens: int) -> None:
    hashes = window_hashes(ids(tokens), num_tokens)
    assert len(hashes) == max(len(tokens) - num_tokens + 1, 0)
    windows = [tuple(tokens[at : at + num_tokens]) for at in range(len(hashes))]
    for n, (window, found) in enumerate(zip(windows, hashes, strict=True)):
        assert found == window_hashes(ids(list(window)), num_tokens)[0]
        assert all((found == other) == (window == windows[m]) for m, other in enumerate(hashes[:n]))


@given(token_lists(1, 20))
def test_each_window_left_out_has_an_equal_one_close_before(tokens: Tokens) -> None:
    hashes = window_hashes(ids(tokens), MIN)
    kept = order_windows(hashes, MIN).tolist()
    assert kept == sorted(kept, key=lambda at: (hashes[at], at))
    for at in range(len(hashes)):
        close = [before for before in range(max(at - MIN + 1, 0), at) if hashes[before] == hashes[at]]
        assert (at in kept) == (not close)


@given(token_lists(1, 12), token_lists(1, 12), st.integers(1, 3))
def test_extensions_are_common_prefixes(first: Tokens, second: Tokens, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FIRST_STEP_TOKENS", step)
        assert common_extension_tokens(ids(first), ids(second)) == count_common_tokens(ids(first), ids(second))
        assert common_extension_tokens(ids(first), ids(first)) == len(first)
