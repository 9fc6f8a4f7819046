"""Documents arranged as they are stored: which order comes out, what a prompt in it reuses, and what reports say."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, PromptError, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.arranging import Text, find_order
from semsharekv_integrations.arranging.notes import MOST_NAMESPACES, MOST_NOTED
from semsharekv_integrations.kv import Reference
from tiny_models import EngineMaker, make_model

TOWNS = ("Velmar", "Osteck", "Karna", "Prorna", "Dora", "Cenro")
NEWS = {
    town: f"News from {town}, by the Morning Post. The cost to {town} is set at {place + 11} million crowns."
    for place, town in enumerate(TOWNS)
}
A, B, C, D, E, F = NEWS.values()
SYSTEM = {"role": "system", "content": "Use these documents:\n\n"}
HEADS = ("", "Read these:\n\n", "Use these documents:\n\n")


def messages(texts: Sequence[str], question: str = "Who?", head: str = SYSTEM["content"]) -> list[dict[str, str]]:
    return [{"role": "system", "content": head + "\n\n".join(texts)}, {"role": "user", "content": question}]


def ask(engine: SemShareEngine, texts: Sequence[str], question: str = "Who?", **options: Any) -> Any:
    return engine.generate(messages(texts, question), **{"max_new_tokens": 2, **options})


def prefix(engine: SemShareEngine, prompt: Any, namespace: str = "default") -> int:
    """Tokens of the prompt's longest stored prefix; computes and stores nothing."""
    ids = engine._load().renderer.render(prompt, {}).token_ids
    return engine.store.count_prefix_tokens(ids, namespace)


def test_the_stored_order_comes_out_and_what_was_never_seen_follows(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C])
    assert engine.arrange([E, C, D, B, A]) == [A, B, C, E, D]
    assert engine.arrange((C, B, A)) == (A, B, C)
    named = {"c": C, "d": D, "b": B, "a": A}
    assert list(engine.arrange(named).items()) == [("a", A), ("b", B), ("c", C), ("d", D)]
    assert list(named) == ["c", "d", "b", "a"], "the given mapping has changed"


def test_without_anything_stored_the_given_order_stays(make_engine: EngineMaker) -> None:
    assert make_engine().arrange([C, A, B]) == [C, A, B]
    assert make_engine().arrange({}) == {} and make_engine().arrange([]) == []
    off = make_engine("off")
    ask(off, [A, B, C])
    assert off.arrange([C, B, A]) == [C, B, A]


def test_a_stored_document_that_is_not_asked_for_ends_the_prefix(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C], documents={"a": A, "b": B, "c": C})
    assert engine.arrange([D, C, A]) == [A, D, C], "C stands behind B, which is not asked for"
    assert engine.arrange([C, B]) == [C, B], "A comes first"
    ask(engine, [D, E])
    assert engine.arrange([C, B, D]) == [D, C, B], "a prefix that is there goes before one that is not"


def test_unnamed_documents_that_come_first_end_the_prefix_where_another_prompt_shows_the_head(
    make_engine: EngineMaker,
) -> None:
    engine = make_engine()
    ask(engine, [A + A[:40], B, C])
    ask(engine, [D, E])
    assert engine.arrange([C, B, D]) == [D, C, B]


def test_a_short_unnamed_document_between_two_parts_them(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, "Rain is expected in Osteck today.", C])
    ask(engine, [E, F])
    assert engine.arrange([F, E, C, A]) == [E, F, C, A]


def test_a_document_that_begins_as_a_stored_one_counts_for_the_given_order(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [f"{A} {B}"])
    ask(engine, [D])
    given = [f"{A} {C}", D]
    assert prefix(engine, messages(given)) > prefix(engine, messages(given[::-1])) > 20
    assert engine.arrange(given, before=[SYSTEM]) == engine.arrange(given) == given


def test_the_most_tokens_win_and_ties_go_by_the_given_order(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C])
    ask(engine, [D, E])
    assert engine.arrange([E, D, C, B, A]) == [A, B, C, E, D]
    same = make_engine()
    for texts in ([A, C], [B, D], [B, E]):
        ask(same, texts)
    tokens = {text: len(same.tokenizer(text).input_ids) for text in (C, D, E)}
    assert len(set(tokens.values())) == 1, "else there is no tie"
    assert same.arrange([F, E, D, B]) == [B, E, F, D]
    assert same.arrange([F, D, E, B]) == [B, D, F, E]


def test_a_text_that_changed_under_its_id_does_not_count(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C], documents={"a": A, "b": B, "c": C})
    for changed in (A.replace("Morning", "Evening"), A.replace("crowns", "euros"), A.replace("News", "Facts")):
        assert list(engine.arrange({"c": C, "b": B, "a": changed})) == ["c", "b", "a"]
    assert list(engine.arrange({"c": C, "b": B.replace("crowns", "euros"), "a": A})) == ["a", "c", "b"]
    assert list(engine.arrange({"d": D, "a": A.replace("crowns", "euros"), "c": C})) == ["d", "a", "c"]


def test_the_prompt_around_the_documents_decides(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.generate(messages([A, B], head="Read these:\n\n"), max_new_tokens=1)
    engine.generate(messages([B, C, A]), max_new_tokens=1)
    given = [C, A, B]

    def arranged(head: str) -> list[str]:
        return engine.arrange(given, before=[{"role": "system", "content": head}])

    assert arranged("Read these:\n\n") == [A, B, C]
    assert arranged("Use these documents:\n\n") == [B, C, A]
    assert arranged("Read these:\n\nNo others, ") == arranged("Read those:\n\n") == given
    engine.generate(f"Read: {B}\n\n{A}", max_new_tokens=1)
    assert engine.arrange([A, B], before="Read: ") == [B, A]
    engine.generate(f"Look at [{B}\n\n{A}", max_new_tokens=1)
    assert engine.arrange([A, B], before="Look at [") == [B, A]
    assert engine.arrange([A, B], before="Look at (") == [A, B]
    assert engine.arrange([A, B], before="Read it: ") == engine.arrange([A, B], before="") == [A, B]


def test_tools_and_template_variables_are_part_of_what_stands_before(make_engine, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ mood }}|" + str(tokenizer.chat_template))
    engine = make_engine()
    kind: dict[str, Any] = {"chat_template_kwargs": {"mood": "brief"}}
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Read:\n\n"}]
    prompt = [before[0], {"role": "user", "content": f"Read:\n\n{A}\n\n{B}\n\nWho?"}]
    engine.generate(prompt, **kind, tools=[tool], max_new_tokens=1)
    assert engine.arrange([B, A], before=before, tools=[tool], **kind) == [A, B]
    assert engine.arrange([B, A], before=before, tools=[tool]) == [B, A]
    assert engine.arrange([B, A], before=before, **kind) == [B, A]


def test_warmed_documents_count_where_nothing_comes_first(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.warm({"b": B})
    assert engine.arrange([A, B]) == [A, B]
    assert engine.arrange([A, B], before="") == [B, A]
    assert engine.arrange([A, B], before=[SYSTEM]) == [A, B]
    engine.generate(f"{C}\n\nWho?", max_new_tokens=1)
    assert engine.arrange([A, B, C]) in ([B, A, C], [C, A, B]), "prompts here begin with documents"
    joined = "\n\n".join(engine.arrange([A, B], before=""))
    assert engine.generate(f"{joined}\n\nWho?", max_new_tokens=1).report.prefix_tokens > prefix(engine, f"{A}\n\n{B}")


def test_documents_that_stand_in_each_other_or_twice(make_engine: EngineMaker) -> None:
    engine = make_engine()
    whole = f"{A} {B}"
    ask(engine, [whole, C])
    assert engine.arrange([C, A, whole]) == [whole, C, A]
    assert engine.arrange([C, whole, C, A]) == [whole, C, A, C]
    assert list(engine.arrange({"c": C, "w": whole, "again": C})) == ["w", "c", "again"]
    unarranged = prefix(engine, messages([C, A, whole], "When?"))
    report = ask(engine, engine.arrange([C, A, whole]), "When?").report
    assert 0 <= report.prefix_tokens - unarranged - report.arranged_tokens <= 2 < report.arranged_tokens


def test_titles_between_documents_do_not_part_them(make_engine: EngineMaker) -> None:
    engine = make_engine()
    text = f"Use these:\n\n{A}\n\nSource: the Post of Osteck, page 12\n{B}\n\nSource: the Post of Karna, page 3\n{C}"
    engine.generate(f"{text}\n\nWho?", max_new_tokens=1)
    assert engine.arrange([C, D, B, A]) == [A, B, C, D]


streams = st.lists(st.lists(st.sampled_from(TOWNS), min_size=1, max_size=4, unique=True), min_size=1, max_size=8)


@settings(max_examples=25)
@given(streams=streams, head=st.sampled_from(HEADS), knows=st.booleans(), names=st.booleans())
def test_an_arranged_prompt_reuses_at_least_as_much_as_the_given_one(
    shared_engine: SemShareEngine, streams: list[list[str]], head: str, knows: bool, names: bool
) -> None:
    engine = shared_engine
    engine.clear()
    before = [{"role": "system", "content": head}] if knows else None
    for place, towns in enumerate(streams):
        texts = [NEWS[town] for town in towns]
        arranged = engine.arrange(texts, before=before)
        assert sorted(arranged) == sorted(texts)
        assert arranged == engine.arrange(texts, before=before), "not the same order twice"
        asked, other = (messages(each, f"Who {place}?", head) for each in (arranged, texts))
        unarranged = prefix(engine, other)
        assert prefix(engine, asked) >= unarranged
        known = {"documents": {town: NEWS[town] for town in towns}} if names else {}
        report = engine.generate(asked, max_new_tokens=1, **known).report
        assert report.arranged_tokens <= report.prefix_tokens
        if report.prefix_tokens and arranged != texts:
            assert abs(report.arranged_tokens - (report.prefix_tokens - unarranged)) <= 2


@pytest.fixture(scope="module")
def shared_engine(llama: Any, tokenizer: PreTrainedTokenizerBase) -> SemShareEngine:
    return SemShareEngine(llama, tokenizer, EngineConfig(reuse=ReuseConfig(mode="exact")))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_answers_in_the_arranged_order_are_those_of_a_full_prefill(
    make_engine: EngineMaker, tokenizer: PreTrainedTokenizerBase, architecture: str
) -> None:
    model = make_model(architecture, len(tokenizer))
    engine, plain = make_engine("exact", model), make_engine("off", model)
    chance, reused = random.Random(5), 0
    for place in range(5):
        arranged = engine.arrange(chance.sample(list(NEWS.values()), 4), before=[SYSTEM])
        found = ask(engine, arranged, f"Who {place}?", max_new_tokens=6)
        assert found.token_ids == ask(plain, arranged, f"Who {place}?", max_new_tokens=6).token_ids
        reused += found.report.prefix_tokens
    assert reused > 0


def test_the_report_says_what_the_order_spared(make_engine: EngineMaker) -> None:
    engine = make_engine()
    first = ask(engine, engine.arrange([A, B, C]))
    assert first.report.arranged_tokens == 0, "the given order was kept"
    unarranged = prefix(engine, messages([D, C, B, A], "When?"))
    report = ask(engine, engine.arrange([D, C, B, A]), "When?").report
    assert report.arranged_tokens == report.prefix_tokens - unarranged > len(engine.tokenizer(A).input_ids)
    assert report.to_dict()["arranged_tokens"] == report.arranged_tokens
    assert {use.tokens > 0 for use in report.documents} == {True} and len(report.documents) == 4
    given = ask(engine, [D, C, B, A], "When?").report
    assert given.arranged_tokens == 0, "not the order that was returned"
    assert ask(engine, [A, B], "Where?").report.arranged_tokens == 0, "not these documents"


async def test_every_entry_point_reports_it(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C])
    asked = messages(engine.arrange([C, B, A]), "When?")
    found = [
        engine.generate(asked, max_new_tokens=1),
        *engine.generate_batch([asked, asked], max_new_tokens=1),
        [chunk for chunk in engine.stream(asked, max_new_tokens=1) if chunk.generation][-1].generation,
        await engine.agenerate(asked, max_new_tokens=1),
    ]
    assert [each.report.arranged_tokens > 0 for each in found if each] == [True] * 5  # type: ignore[union-attr]


def test_other_tenants_and_states_change_nothing(make_engine: EngineMaker) -> None:
    engine = make_engine()
    ask(engine, [A, B, C], namespace="theirs")
    engine.arrange([C, B, A], "theirs")
    assert engine.arrange([C, B, A], "ours") == [C, B, A]
    report = ask(engine, [A, B, C], namespace="others").report
    assert report.arranged_tokens == 0 and report.documents == ()
    shared = make_engine(store=StoreConfig(shared_namespace="all"))
    ask(shared, [A, B, C], namespace="all")
    assert shared.arrange([C, B, A], "ours") == [A, B, C]


def test_what_another_state_of_the_model_made_does_not_count(make_engine: EngineMaker, tokenizer) -> None:
    model = make_model("llama", len(tokenizer))
    engine = make_engine(model=model)
    ask(engine, [A, B, C])
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert engine.arrange([C, B, A]) == [C, B, A]


def test_prompts_on_disk_count(make_engine: EngineMaker, tmp_path: Path) -> None:
    first = make_engine(store=StoreConfig(directory=tmp_path))
    ask(first, [A, B, C])
    first.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    report = ask(again, again.arrange([C, B, A], before=[SYSTEM]), "When?").report
    assert report.prefix_tokens >= report.arranged_tokens > len(again.tokenizer(A + B).input_ids)
    again.close()


def test_what_is_forgotten_is_remembered_nowhere(make_engine: EngineMaker) -> None:
    for forget in (
        lambda engine: engine.forget("b"),
        lambda engine: engine.clear("default"),
        lambda engine: engine.clear(),
    ):
        engine = make_engine()
        engine.generate("Who is the mayor?", max_new_tokens=1)
        ask(engine, [A, B, C])
        engine.arrange({"c": C, "b": B, "a": A})
        forget(engine)
        assert not engine._memory.arranged.list_latest("default")
        assert engine.arrange([C, B, A]) == [C, B, A]


def test_what_is_remembered_is_bounded(make_engine: EngineMaker) -> None:
    engine = make_engine()
    for number in range(MOST_NOTED + 5):
        engine.arrange([A, f"{B} {number}"])
    assert len(engine._memory.arranged.list_latest("default")) == MOST_NOTED
    for number in range(MOST_NAMESPACES):
        engine.arrange([A, B], str(number))
    assert not engine._memory.arranged.list_latest("default")


@pytest.mark.parametrize(
    ("documents", "options", "named"),
    [
        (None, {}, "documents"),
        (A, {}, "documents"),
        ([A, " "], {}, "documents"),
        ([A, 3], {}, "documents"),
        ({"": A}, {}, "documents"),
        ({"a": None}, {}, "documents"),
        ([A], {"namespace": ""}, "namespace"),
        ([A], {"before": 3}, "before"),
        ([A], {"before": []}, "before"),
        ([A], {"before": [{"role": "user"}]}, "before"),
        ([A], {"before": "\ud800"}, "before"),
        ([A], {"before": [SYSTEM], "tools": "look"}, "tools"),
        ([A], {"behind": ""}, "options"),
    ],
)
def test_what_cannot_be_arranged_is_refused(make_engine, documents: Any, options: Any, named: str) -> None:
    for mode in ("exact", "off"):
        with pytest.raises(ValueError, match=rf"^{named}.* is .*; accepted is "):
            make_engine(mode).arrange(documents, **options)


def test_messages_that_cannot_be_rendered_are_refused(make_engine: EngineMaker) -> None:
    with pytest.raises(PromptError, match="role"):
        make_engine().arrange([A], before=[{"role": "nobody", "content": ""}])


def test_an_order_is_found_fast_in_a_large_store() -> None:
    chance = np.random.default_rng(3)
    texts = [Text(str(index), chance.integers(0, 900, 200)) for index in range(20)]
    head = np.arange(30)

    def stored(order: Sequence[int]) -> Reference:
        ids = np.concatenate([head, *(texts[index].token_ids for index in order)])
        return Reference("", "default", ids.astype(np.int64), ())

    orders = [chance.permutation(20)[:6] for _ in range(400)]
    references = [stored(order) for order in orders]
    asked = [texts[index] for index in orders[200][::-1]]
    began = perf_counter()
    found = find_order(asked, references, None, lambda ids: "")
    assert [asked[index].content for index in found] == [texts[index].content for index in orders[200]]
    assert perf_counter() - began < 5, "far more than milliseconds"


def test_documents_need_no_mapping_of_a_certain_kind(make_engine: EngineMaker) -> None:
    class Texts(Mapping[str, str]):
        def __getitem__(self, key: str) -> str:
            return {"b": B, "a": A}[key]

        def __iter__(self) -> Any:
            return iter(("b", "a"))

        def __len__(self) -> int:
            return 2

    engine = make_engine()
    ask(engine, [A, B])
    assert list(engine.arrange(Texts())) == ["a", "b"]
