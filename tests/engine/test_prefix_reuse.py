"""What a later prompt takes from an earlier one: everything that has KV, and what the report and stats say of it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import ReuseConfig, SemShareEngine, StoreConfig
from tiny_models import EngineMaker

ASK = [{"role": "user", "content": "What happened in Prorna, and who is the mayor of Velmar?"}]


def favour(model: PreTrainedModel, monkeypatch, *token_ids: int) -> None:
    """Make the model answer with ``token_ids``, whatever the prompt, one for each forward pass."""
    forward, rest = model.forward, iter(token_ids)

    def favoured(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(next(rest)), output.logits.shape[-1]).float()
        return output

    monkeypatch.setattr(model, "forward", favoured)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def next_turn(text: str) -> list[dict[str, str]]:
    return [*ASK, {"role": "assistant", "content": text}, {"role": "user", "content": "And the cost?"}]


def test_next_turn_computes_only_what_is_new(make_engine: EngineMaker, tokenizer, llama, monkeypatch) -> None:
    engine = make_engine()
    reply = ids_of(tokenizer, "A flood.")
    favour(llama, monkeypatch, *reply, tokenizer.eos_token_id, tokenizer.eos_token_id)
    first = engine.generate(ASK)
    assert first.finish_reason == "stop" and first.text == "A flood."
    second = engine.generate(next_turn(first.text))
    # the end-of-sequence token was sampled, but never run
    assert second.report.prefix_tokens == first.report.prompt_tokens + len(reply)
    assert second.report.recomputed_tokens == len(ids_of(tokenizer, "<|end|><|user|>And the cost?<|end|><|assistant|>"))
    assert second.report.sources[0].tokens == second.report.prefix_tokens


def test_next_turn_after_the_length_limit(make_engine: EngineMaker, tokenizer, llama, monkeypatch) -> None:
    engine = make_engine()
    reply = ids_of(tokenizer, "A flood and a fire")
    favour(llama, monkeypatch, *reply, tokenizer.eos_token_id)
    first = engine.generate(ASK, max_new_tokens=len(reply))
    assert first.finish_reason == "length" and first.token_ids == reply
    second = engine.generate(next_turn(first.text))
    assert second.report.prefix_tokens == first.report.prompt_tokens + len(reply) - 1  # the last one has no KV


def test_reply_with_a_special_token_ends_the_prefix_there(make_engine, tokenizer, llama, monkeypatch) -> None:
    """The next turn's text does not hold the special token: what follows it stands elsewhere and is not reused."""
    engine = make_engine()
    before, after = ids_of(tokenizer, "A flood"), ids_of(tokenizer, " and a fire")
    special = tokenizer.convert_tokens_to_ids("<|user|>")
    favour(llama, monkeypatch, *before, special, *after, *[tokenizer.eos_token_id] * 2)
    first = engine.generate(ASK)
    assert first.text == "A flood and a fire"
    second = engine.generate(next_turn(first.text))
    assert second.report.prefix_tokens == first.report.prompt_tokens + len(before)


def test_same_prompt_again_computes_one_token(make_engine: EngineMaker) -> None:
    engine = make_engine()
    first, again = (engine.generate(ASK, max_new_tokens=4) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert again.report.recomputed_tokens == 1
    assert engine.stats()["store_entries"] == 1


def written_otherwise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of ``text``, one for each letter, which the tokenizer would not choose."""
    letters = [token for letter in text for token in ids_of(tokenizer, letter)]
    assert tokenizer.decode(letters) == text and letters != ids_of(tokenizer, text)
    return letters


@pytest.mark.parametrize("stop", [None, ["\n\nQ"]])
@pytest.mark.parametrize("text", ["flood", "A flood.", " and a fire ", "Prorna 世界"])
def test_the_next_turn_is_what_the_template_says_whatever_tokens_the_reply_had(
    make_engine: EngineMaker, tokenizer, llama, monkeypatch, text: str, stop: list[str] | None
) -> None:
    """So an engine that said it, one that did not, and plain transformers see and answer the same."""
    said, wanted = make_engine("exact"), make_engine("off")
    letters = written_otherwise(tokenizer, text)
    favour(llama, monkeypatch, *letters, *(ids_of(tokenizer, "\n\nQ") if stop else []), tokenizer.eos_token_id)
    first = said.generate(ASK, stop=stop)
    assert first.text == text and first.token_ids[: len(letters)] == letters
    monkeypatch.undo()
    turn = next_turn(first.text)
    plain = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert said._load().renderer.render(turn, {}).token_ids.tolist() == plain
    second = said.generate(turn, max_new_tokens=6)
    assert second.token_ids == wanted.generate(turn, max_new_tokens=6).token_ids
    stored = [*said._load().renderer.render(ASK, {}).token_ids.tolist(), *first.token_ids]
    assert second.report.prefix_tokens >= num_common(stored[:-1], plain) >= first.report.prompt_tokens


def num_common(some: list[int], others: list[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def test_what_one_namespace_was_told_changes_no_prompt_of_another(make_engine, tokenizer, llama, monkeypatch) -> None:
    engine = make_engine()
    favour(llama, monkeypatch, *written_otherwise(tokenizer, "flood"), tokenizer.eos_token_id)
    engine.generate(ASK, namespace="a")
    monkeypatch.undo()
    told, fresh = (
        each._load().renderer.render(next_turn("flood"), {}).token_ids.tolist() for each in (engine, make_engine())
    )
    assert told == fresh


def test_namespaces_share_nothing(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.generate(ASK, namespace="a", max_new_tokens=2)
    other = engine.generate(ASK, namespace="b", max_new_tokens=2)
    assert other.report.prefix_tokens == 0 and other.report.declined == "no stored prefix"


def test_stats_count_what_reports_say(make_engine: EngineMaker) -> None:
    engine = make_engine()
    reports = [engine.generate(ASK, max_new_tokens=3).report for _ in range(3)]
    stats = engine.stats()
    assert stats["requests"] == 3
    assert stats["prompt_tokens"] == sum(report.prompt_tokens for report in reports)
    assert stats["reused_tokens"] == sum(report.reused_tokens for report in reports) > 0
    assert stats["output_tokens"] == sum(report.output_tokens for report in reports)
    assert (stats["store_hits"], stats["store_misses"]) == (2, 1)


def test_short_prefixes_are_declined(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=ReuseConfig(mode="exact", min_prefix_tokens=1000))
    engine.generate(ASK, max_new_tokens=2)
    report = engine.generate(ASK, max_new_tokens=2).report
    assert report.prefix_tokens == 0 and "min_prefix_tokens" in (report.declined or "")


def test_store_without_room_costs_nothing_but_reuse(make_engine: EngineMaker) -> None:
    engine = make_engine(store=StoreConfig(max_bytes=0))
    first, again = (engine.generate(ASK, max_new_tokens=4) for _ in range(2))
    assert again.token_ids == first.token_ids and again.report.prefix_tokens == 0
    assert engine.stats()["store_refused"] == 2


class TestDocuments:
    TEXTS = {"a": "The mayor of Prorna is Anna Belmor.", "b": "A flood hit Velmar in May."}

    def prompt(self, *names: str) -> str:
        return "News: " + " ".join(self.TEXTS[name] for name in names) + " What happened?"

    def test_report_says_how_much_of_each_was_reused(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        engine.generate(self.prompt("a"), documents={"a": self.TEXTS["a"]}, max_new_tokens=2)
        report = engine.generate(self.prompt("a", "b"), documents=self.TEXTS, max_new_tokens=2).report
        used = {document.document_id: document for document in report.documents}
        assert used["a"].reused_tokens == used["a"].tokens > 5
        assert used["b"].reused_tokens == 0 < used["b"].tokens

    def test_forget_drops_every_entry_with_the_document(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        for names in (("a",), ("b",), ("a", "b")):
            engine.generate(self.prompt(*names), documents={n: self.TEXTS[n] for n in names}, max_new_tokens=2)
        assert engine.forget("a", namespace="other") == 0
        assert engine.forget("a") == 2
        assert engine.generate(self.prompt("b"), max_new_tokens=2).report.recomputed_tokens == 1

    def test_forget_knows_documents_that_were_put_otherwise(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        engine.generate(
            self.prompt("a").replace(" mayor", "\nmayor"), documents={"a": self.TEXTS["a"]}, max_new_tokens=2
        )
        assert engine.forget("a") == 1

    def test_forget_follows_a_document_into_later_turns(self, make_engine: EngineMaker) -> None:
        """Also into a branch that does not contain the whole earlier entry, and names no documents."""
        engine = make_engine()
        engine.generate(self.prompt("a"), documents={"a": self.TEXTS["a"]}, max_new_tokens=5)
        branch = engine.generate(self.prompt("a") + " And who is the chief?", max_new_tokens=2)
        assert branch.report.prefix_tokens > 0
        unlike = engine.generate("News: nothing at all.", max_new_tokens=2)
        assert unlike.report.prefix_tokens > 0  # shares the first words, not the document
        entries = engine.stats()["store_entries"]
        assert engine.forget("a") == entries - 1

    def test_warm_documents_start_prompts(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        assert engine.warm(self.TEXTS, pinned=True) == 2
        report = engine.generate(self.TEXTS["a"] + " What happened?", max_new_tokens=2).report
        assert report.documents[0].reused_tokens == report.documents[0].tokens
        engine.store.check()
        assert engine.warm(self.TEXTS) == 2  # again, no longer pinned: contained already
        engine.store.check()
        assert engine.generate("Nothing of it.", max_new_tokens=2).report.prefix_tokens == 1  # the start token
        assert engine.forget("a") == 2 and engine.forget("b") == 1

    def test_sessions_are_cleared_alone(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        engine.generate(self.prompt("a"), session="one", max_new_tokens=2)
        engine.generate(self.prompt("b"), session="two", max_new_tokens=2)
        assert engine.clear("default", session="one") == 1
        assert engine.generate(self.prompt("b"), max_new_tokens=2).report.recomputed_tokens == 1
        assert engine.clear() == 1


def test_mode_off_keeps_nothing(make_engine: EngineMaker) -> None:
    engine: SemShareEngine = make_engine("off")
    engine.generate(ASK, max_new_tokens=2)
    assert engine.warm(["A text."]) == 0
    assert engine.stats()["store_entries"] == 0 and engine.stats()["reused_tokens"] == 0
