"""The synthetic world: the same at every call with the same seed, and its changes change what they say."""

from __future__ import annotations

import importlib
import sys
from itertools import chain
from pathlib import Path
from random import Random

import pytest

from semsharekv_integrations import world

LAB = Path(__file__).parents[2] / "examples" / "lab"
SEEDS = range(40)


def documents(seed: int, count: int = 3) -> list[world.Document]:
    return world.make_documents(Random(seed), count)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(LAB))
    yield importlib.import_module("samples")
    sys.modules.pop("samples")


def test_a_seed_fixes_everything() -> None:
    for seed in SEEDS:
        assert documents(seed) == documents(seed)
        one, two = documents(seed)[0], documents(seed)[0]
        assert world.reword(Random(seed), one) == world.reword(Random(seed), two)
        assert world.edit(Random(seed), one) == world.edit(Random(seed), two)
        assert world.ask(Random(seed), one) == world.ask(Random(seed), two)
    assert documents(1) != documents(2)


def test_towns_are_different_and_counts_are_checked() -> None:
    found = documents(0, len(world.TOWNS))
    assert len({document.town for document in found}) == len(world.TOWNS)
    for count in (0, -1, len(world.TOWNS) + 1):
        with pytest.raises(ValueError, match=f"count is {count}"):
            documents(0, count)


def test_every_fact_is_stated_behind_its_town() -> None:
    for kind in world.KINDS.values():
        assert len(set(kind.statements)) == len(kind.statements) > 1
        for statement in kind.statements:
            assert -1 < statement.find("{t}") < statement.find("{v}"), statement
            assert statement.count("{v}") == 1
        assert all("{t}" in question and "{v}" not in question for question in kind.questions)
    for seed in SEEDS:
        for document in documents(seed):
            assert document.facts.keys() >= set(world.CORE_KINDS)
            for kind, value in document.facts.items():
                (sentence,) = [document._render(s) for s in document.sentences if s.kind == kind]
                assert sentence in document.text
                assert sentence.index(document.town) < sentence.index(value)
                assert value in document.answer(kind) and document.town in document.answer(kind)


def test_reword_keeps_the_facts_and_changes_every_statement() -> None:
    for seed in SEEDS:
        before = documents(seed)[0]
        after = world.reword(Random(seed + 100), before)
        assert (after.town, after.facts) == (before.town, before.facts)
        assert [s.kind for s in after.sentences] == [s.kind for s in before.sentences]
        for old, new in zip(before.sentences, after.sentences, strict=True):
            if old.kind:
                assert new.template != old.template
                assert after.facts[old.kind] in after._render(new)


def test_edit_changes_exactly_the_named_facts() -> None:
    for seed in SEEDS:
        before = documents(seed)[0]
        for kinds in (("date",), ("event", "cost"), None):
            after = world.edit(Random(seed), before, kinds)
            changed = {kind for kind in before.facts if before.facts[kind] != after.facts[kind]}
            assert changed == set(kinds) if kinds else len(changed) == 1
            assert (after.headline, after.sentences) == (before.headline, before.sentences)


def test_swap_exchanges_what_both_state() -> None:
    for seed in SEEDS:
        first, second = documents(seed, 2)
        new_first, new_second = world.swap(first, second)
        for kind in first.facts.keys() & second.facts.keys():
            assert (new_first.facts[kind], new_second.facts[kind]) == (second.facts[kind], first.facts[kind])
        for before, after, other in ((first, new_first, second), (second, new_second, first)):
            assert (after.town, after.headline, after.sentences) == (before.town, before.headline, before.sentences)
            for kind in before.facts.keys() - other.facts.keys():
                assert after.facts[kind] == before.facts[kind]
        assert world.swap(new_first, new_second) == (first, second)


def test_the_original_is_left_alone() -> None:
    before, copy = documents(3)[0], documents(3)[0]
    world.edit(Random(1), before), world.reword(Random(1), before), world.swap(before, documents(4)[0])
    assert before == copy
    with pytest.raises(TypeError):
        before.facts["date"] = "never"  # type: ignore[index]


def test_questions_have_their_document_s_answer() -> None:
    for seed in SEEDS:
        document = documents(seed)[0]
        question, answer = world.ask(Random(seed), document, "mayor" if "mayor" in document.facts else "date")
        assert document.town in question and document.town in answer


@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_layouts_hold_documents_and_question(layout: world.Layout) -> None:
    found = documents(5)
    for wrap in range(8):
        built = world.build_prompt(layout, found, "What happened?", wrap)
        text = built if isinstance(built, str) else "\n".join(message["content"] for message in built)
        places = [text.index(document.text) for document in found]
        assert places == sorted(places) and text.rindex("What happened?") > places[-1]
    assert world.build_prompt(layout, found, "x", 0) == world.build_prompt(layout, found, "x", 0)


def test_training_rows_read_like_prompts(samples, tokenizer) -> None:
    """A chat row's tokens are those of the shipped chat template; a completion's, those of the plain prompt."""
    for layout in ("system", "user", "turns"):
        maker, row = samples.RowMaker(tokenizer, seed=4), samples.Row()
        found = documents(6, 2)
        maker._chat(row, found, layout, 1)
        again = samples.RowMaker(tokenizer, seed=4)
        question, answer = again._turn(found)
        messages = world.build_prompt(layout, found, question, wrap=again.rng.randrange(1000))
        messages.append({"role": "assistant", "content": answer})
        assert row.ids == tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        start, stop = row.answers[-1]
        assert row.ids[:start] == prompt and stop == len(row.ids)
        assert tokenizer.decode(row.ids[start:stop]) == answer + tokenizer.eos_token
    row = samples.Row()
    samples.RowMaker(tokenizer, seed=4)._completion(row, documents(6, 2), 1)
    start, _ = row.answers[0]
    assert row.ids[:start] == tokenizer(tokenizer.decode(row.ids[1:start])).input_ids


def test_training_rows_have_their_length(samples, tokenizer) -> None:
    maker = samples.RowMaker(tokenizer, seed=1)
    for row in (
        maker.copy_row(200),
        maker.recall_row(200, 3),
        maker.prompt_row(300, 2, 0.0),
        maker.prompt_row(300, 3, 1.0),
    ):
        assert len(row.ids) == len(row.weights) == len(row.positions) in (200, 300)
        assert row.positions == sorted(set(row.positions))
        assert all(0 <= start < stop <= len(row.ids) for start, stop in row.answers)


def test_names_are_single_tokens(tokenizer) -> None:
    names = [world.NAMES[key] for key in ("towns", "first_names", "surnames", "companies", "months")]
    for name in chain.from_iterable(names):
        assert len(tokenizer.encode(f" {name}", add_special_tokens=False)) == 1, name


def test_a_distractor_shares_wording_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LAB))
    from calibrate_similarity import distract

    rng = Random(8)
    for document in world.make_documents(rng, 20):
        other = distract(rng, document)
        assert other.sentences == document.sentences and other.town != document.town
        assert other.facts.keys() == document.facts.keys()
        assert all(other.facts[kind] != value for kind, value in document.facts.items())


def test_a_conversation_asks_what_its_documents_state() -> None:
    documents = world.make_documents(Random(9), 3)
    turns = world.converse(Random(1), documents, 12)
    assert turns == world.converse(Random(1), documents, 12) and len(turns) == 12
    right = {document.answer(kind) for document in documents for kind in document.facts}
    assert {answer for _, answer in turns} <= right
