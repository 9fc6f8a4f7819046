"""Documents that are known: computed ahead of time, found without being named, replaced when they change."""

from __future__ import annotations

import pytest

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.memory import MOST_KNOWN_TEXTS, KnownTexts
from semsharekv_integrations.request import make_document_id
from tiny_models import EngineMaker

VELMAR = "News from Velmar, by the Morning Post. The mayor of Velmar is Anna Kelsen. Schools will open again soon."
OSTECK = "News from Osteck, by the Daily Courier. The cost to Osteck is set at 17 million crowns. Rain is expected."
TOKENS = {"max_new_tokens": 3}


@pytest.fixture
def engine(make_engine: EngineMaker) -> SemShareEngine:
    return make_engine("identical")


def used(engine: SemShareEngine, prompt: str, **options: object) -> dict[str, int]:
    """How many tokens of each document of a prompt were reused."""
    report = engine.generate(prompt, **TOKENS, **options).report
    return {use.document_id: use.reused_tokens for use in report.documents}


def test_what_was_warmed_is_found_in_prompts_that_do_not_name_it(engine: SemShareEngine) -> None:
    assert engine.warm({"v": VELMAR, "o": OSTECK}) == 2
    found = used(engine, f"Read this.\n\n{OSTECK}\n\n{VELMAR}\n\nWho is the mayor?")
    assert found.keys() == {"v", "o"}
    assert used(engine, "Nothing of it is here.") == {}
    named = used(engine, f"{OSTECK}\n\n{VELMAR}", documents={"other": VELMAR})
    assert named.keys() == {"o", "other"}, "the call's own name counts"


def test_a_document_without_an_id_goes_by_the_one_it_is_known_under(engine: SemShareEngine) -> None:
    engine.warm({"v": VELMAR})
    assert used(engine, f"Read: {VELMAR}\n\n{OSTECK}", documents=[VELMAR, OSTECK]).keys() == {
        "v",
        make_document_id(OSTECK),
    }
    assert used(engine, f"Again: {OSTECK}") == {}, "what has no name is not remembered by it"
    assert engine.forget("v") == 2


def test_what_a_call_named_is_known_to_the_next_of_its_namespace(engine: SemShareEngine) -> None:
    used(engine, f"{VELMAR} Who?", documents={"v": VELMAR}, namespace="a")
    assert used(engine, f"Now: {VELMAR}", namespace="a").keys() == {"v"}
    assert used(engine, f"Now: {VELMAR}", namespace="b") == {}


def test_what_is_forgotten_or_cleared_is_not_known(engine: SemShareEngine) -> None:
    for forget in (lambda: engine.forget("v"), lambda: engine.clear("default"), engine.clear):
        engine.warm({"v": VELMAR, "o": OSTECK})
        forget()
        assert "v" not in used(engine, f"Read: {VELMAR}")
        engine.clear()


def test_of_texts_that_overlap_the_longest_counts(engine: SemShareEngine) -> None:
    engine.warm({"sentence": VELMAR[:38], "whole": VELMAR, "osteck": OSTECK})
    assert used(engine, f"Read: {VELMAR}\n\n{OSTECK}").keys() == {"whole", "osteck"}


def test_a_changed_document_replaces_the_old_one(engine: SemShareEngine) -> None:
    changed = VELMAR.replace("Anna Kelsen", "Boris Hartwell")
    engine.warm({"v": VELMAR, "o": OSTECK}, pinned=True)
    engine.generate(f"{VELMAR}\n\nWho is the mayor?", **TOKENS)  # a prompt that begins with it carries it as well
    engine.generate(f"{OSTECK}\n\nWhat is the cost?", **TOKENS)
    before = {reference.id for reference in engine.store.references("default")}
    assert engine.warm({"v": changed}) == 1
    texts = [engine.tokenizer.decode(reference.token_ids) for reference in engine.store.references("default")]
    assert not any("Anna Kelsen" in text for text in texts)
    assert sum("Boris Hartwell" in text for text in texts) == 1
    assert sum("Osteck" in text for text in texts) == 2, "what only begins alike stays"
    assert len(before & {reference.id for reference in engine.store.references("default")}) == 2
    engine.store.check()
    assert used(engine, f"Read: {changed}").keys() == {"v"} and used(engine, f"Read: {VELMAR}") == {}


def test_the_same_document_again_keeps_all_that_carries_it(engine: SemShareEngine) -> None:
    engine.warm({"v": VELMAR})
    engine.generate(f"{VELMAR}\n\nWho is the mayor?", **TOKENS)
    before = [reference.id for reference in engine.store.references("default")]
    assert engine.warm({"v": VELMAR}) == 1
    assert [reference.id for reference in engine.store.references("default")] == before


def test_another_namespace_keeps_its_version(engine: SemShareEngine) -> None:
    engine.warm({"v": VELMAR}, namespace="a")
    engine.warm({"v": VELMAR + " Nobody was hurt."}, namespace="b")
    assert used(engine, f"Read: {VELMAR}", namespace="a").keys() == {"v"}
    assert len(engine.store.references("a")) == 2


def test_progress_is_shown_when_asked_for(engine: SemShareEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.warm([VELMAR, OSTECK], progress=True)
    assert "computing KV" in capsys.readouterr().err
    engine.warm([VELMAR, OSTECK])
    assert capsys.readouterr().err == ""


def test_only_the_latest_texts_are_known() -> None:
    known = KnownTexts()
    known.note("n", {str(number): "text" for number in range(MOST_KNOWN_TEXTS)})
    known.note("n", {"0": "named again", "new": "text"})
    assert len(known.of(["n"])) == MOST_KNOWN_TEXTS
    assert known.of(["n"])["0"] == "named again" and "1" not in known.of(["n"])
    known.note("shared", {"0": "theirs", "s": "text"})
    assert known.of(["n", "shared"])["0"] == "named again" and "s" in known.of(["n", "shared"])
    known.note("n", {"0": " "})
    assert known.of(["n"])["0"] == "named again", "blank texts stand nowhere"
    known.forget("nobody")
    known.forget()
    assert known.of(["n", "shared"]) == {}
