"""Prompt lookup: drafts change how many passes an answer takes, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import AuditConfig, Generation, ReuseConfig, SamplingConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.call import Answer
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.choosing import TokenChooser
from semsharekv_integrations.model.drafting import Drafter, PassCosts
from semsharekv_integrations.model.loading import REFERENCE_MODEL
from tiny_models import ARCHITECTURES, STATEFUL, EngineMaker, make_model

PROMPT = "Report on Prorna in the Daily Courier. People affected by it numbered 1204."
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 3},
    {"repetition_penalty": 1.3, "temperature": 0.5, "seed": 4},
    {"json_schema": SCHEMA, "temperature": 2.0, "seed": 1},
]
Guess = Callable[[list[int], int], list[int]]
Foresee = Callable[..., None]


def make_endless(architecture: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that never ends an answer."""
    model = make_model(architecture, len(tokenizer), **STATEFUL.get(architecture, {}))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def foresee(monkeypatch: pytest.MonkeyPatch) -> Foresee:
    """Drafts that know the answer, but for what ``spoil`` does to them."""

    def foresee(answer: list[int], spoil: Guess = lambda draft, at: draft, length: int = 5) -> None:
        def propose(drafter: Drafter, room: int) -> np.ndarray:
            at = drafter._size - drafter._answer
            return np.array(spoil(answer[at : at + min(length, room)], at), dtype=np.int64)

        monkeypatch.setattr(Drafter, "propose", propose)

    return foresee


@pytest.fixture
def make_shipped() -> Callable[..., SemShareEngine]:
    """Engines around the trained model that ships."""
    return lambda: SemShareEngine.from_pretrained(REFERENCE_MODEL)


def with_end(model: PreTrainedModel, token_id: int | None) -> PreTrainedModel:
    """The model with another end-of-sequence token."""
    changed = copy.copy(model)
    changed.generation_config = copy.deepcopy(model.generation_config)
    changed.generation_config.eos_token_id = token_id
    return changed


def spoil_one(draft: list[int], at: int) -> list[int]:
    """One token is wrong, at every place in turn; sometimes none is."""
    wrong = at % 6
    return [token + 1 if index == wrong else token for index, token in enumerate(draft)]


def same_answer(one: Generation, other: Generation) -> bool:
    return (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def require_same_store(one: SemShareEngine, other: SemShareEngine) -> None:
    """Both keep the same tokens, the same KV of them up to rounding, and as much memory."""
    for kept, expected in zip(one.store.fetch_all(), other.store.fetch_all(), strict=True):
        assert kept.token_ids.tolist() == expected.token_ids.tolist()
        for layer, same in zip(kept.layers, expected.layers, strict=True):
            for tensor, wanted in zip(layer, same, strict=True):
                torch.testing.assert_close(tensor, wanted, atol=2e-4, rtol=1e-3)
                assert tensor.untyped_storage().nbytes() == wanted.untyped_storage().nbytes(), "rejected KV stays"


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "gemma3_text", "phi3", "gpt_neox", "stablelm", "lfm2", "mamba2"]
)
def test_answers_are_those_without_drafts(
    architecture: str, tokenizer: PreTrainedTokenizerBase, make_engine: EngineMaker, foresee: Foresee
) -> None:
    model = make_endless(architecture, tokenizer)
    plain, drafting = make_engine("exact", model), make_engine("exact", model)
    takes_drafts = plain._load().adapter.takes_drafts
    assert takes_drafts == (architecture in ARCHITECTURES)
    for options in OPTIONS if architecture == "llama" else OPTIONS[:2]:
        wanted = plain.generate(PROMPT, max_new_tokens=18, prompt_lookup=False, **options)
        foresee(wanted.token_ids, spoil_one)
        found = drafting.generate(PROMPT, max_new_tokens=18, **options)
        assert same_answer(found, wanted), options
        assert wanted.report.drafted_tokens == wanted.report.accepted_tokens == 0
        if takes_drafts:
            assert 0 < found.report.accepted_tokens < found.report.drafted_tokens
        else:
            assert found.report.drafted_tokens == 0
    if takes_drafts:
        require_same_store(drafting, plain)


@pytest.mark.parametrize(
    ("mode", "lookup"), [("exact", True), ("exact", 1), ("exact", 64), ("off", 4), ("identical", 4), ("semantic", True)]
)
def test_looking_up_for_real_changes_no_answer(
    make_engine: EngineMaker, llama: PreTrainedModel, mode: str, lookup: bool | int
) -> None:
    engine, drafted = make_engine(mode, model=with_end(llama, None)), 0
    for prompt in (PROMPT, PROMPT, f"{PROMPT} It was so. {PROMPT}"):
        found = engine.generate(prompt, max_new_tokens=40, prompt_lookup=lookup)
        wanted = engine.generate(prompt, max_new_tokens=40, prompt_lookup=False)
        assert same_answer(found, wanted)
        report = found.report
        assert 0 <= report.accepted_tokens <= report.drafted_tokens and report.accepted_tokens < report.output_tokens
        drafted += report.drafted_tokens
    assert (drafted > 0) == (mode != "off") or lookup is True


def test_the_shipped_model_accepts_what_it_said_before(make_shipped: Callable[..., SemShareEngine]) -> None:
    engine = make_shipped()
    prompt = (
        "In Prorna , a flood was reported . In Prorna , 1204 people were affected .\n\nWho was affected in Prorna ?"
    )
    first = engine.generate(prompt, max_new_tokens=24, prompt_lookup=False)
    again = engine.generate(prompt, max_new_tokens=24, prompt_lookup=15)
    assert same_answer(first, again)
    assert again.report.accepted_tokens >= len(first.token_ids) - 3, "all but the first tokens"


def test_only_what_the_call_may_read_is_looked_up(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    begin = Drafter.__init__

    def note(self: Drafter, prompt_ids: Any, sources: Any, *rest: Any) -> None:
        seen.append([source.tolist() for source in sources])
        begin(self, prompt_ids, sources, *rest)

    monkeypatch.setattr(Drafter, "__init__", note)
    engine = make_engine("exact", store=StoreConfig(shared_namespace="all"))
    options = {"max_new_tokens": 12}
    answer = engine.generate(PROMPT, namespace="a", **options).token_ids
    engine.generate(PROMPT, namespace="b", **options)
    engine.generate(PROMPT, namespace="a", **options)
    assert seen[0] == seen[1] == [], "b sees nothing of a"
    (source,) = seen[2]
    assert source[-11:] == answer[:11]
    engine.clear("a")
    engine.generate(PROMPT, namespace="a", **options)
    assert seen[3] == [], "what is forgotten is not looked up"
    engine.generate(f"{PROMPT} More.", namespace="all", **options)
    engine.generate(f"{PROMPT} More.", namespace="c", **options)
    assert len(seen[5]) == 1, "shared texts are for all"


def test_streams_yield_the_same_pieces(make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee) -> None:
    engine = make_engine("exact", model=with_end(llama, None))
    wanted = [chunk.text for chunk in engine.stream(PROMPT, max_new_tokens=20, prompt_lookup=False)]
    foresee(engine.generate(PROMPT, max_new_tokens=20, prompt_lookup=False).token_ids, spoil_one)
    *chunks, last = engine.stream(PROMPT, max_new_tokens=20)
    assert [*(chunk.text for chunk in chunks), last.text] == wanted
    assert last.generation is not None and last.generation.report.accepted_tokens > 0


@pytest.mark.parametrize("read", range(1, 9))
def test_a_stream_left_within_a_draft_leaves_what_was_said(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee, read: int
) -> None:
    model = with_end(llama, None)
    wanted = make_engine("off", model).generate(PROMPT, max_new_tokens=20).token_ids
    foresee(wanted)
    engine = make_engine("exact", model)
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        add = TokenChooser.add
        patch.setattr(TokenChooser, "add", lambda self, choice: steps.append(choice.token_id) or add(self, choice))
        chunks = engine.stream(PROMPT, max_new_tokens=20)
        for _ in range(read):
            next(chunks)
        chunks.close()
        (kept,) = engine.store.fetch_all()
    said = steps[: len(steps)]
    num_prompt = len(kept.token_ids) - len(said) + 1
    assert said == wanted[: len(said)] and kept.token_ids[num_prompt:].tolist() == said[:-1]
    assert {layer.keys.shape[2] for layer in kept.layers} == {len(kept.token_ids)}
    fresh = ModelAdapter(model, "exact").compute_kv(kept.token_ids, 0)
    for layer, expected in zip(kept.layers, fresh, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=2e-4, rtol=1e-3)
    assert engine.generate(PROMPT, max_new_tokens=20).token_ids == wanted


def test_an_answer_ends_within_a_draft(make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee) -> None:
    free = make_engine("off", with_end(llama, None)).generate(PROMPT, max_new_tokens=16)
    foresee(free.token_ids)
    stop = make_engine().tokenizer.decode(free.token_ids[3:5]).strip()
    for model, options in (
        (with_end(llama, free.token_ids[4]), {"max_new_tokens": 16}),
        (with_end(llama, None), {"max_new_tokens": 4}),
        (with_end(llama, None), {"max_new_tokens": 16, "stop": stop}),
    ):
        plain, drafting = make_engine("exact", model), make_engine("exact", model)
        wanted, found = plain.generate(PROMPT, prompt_lookup=False, **options), drafting.generate(PROMPT, **options)
        assert same_answer(found, wanted) and len(found.token_ids) < 16
        assert found.report.accepted_tokens > 0
        require_same_store(drafting, plain)


def test_audits_see_the_logits_of_each_token(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    record = Answer.record_logits
    monkeypatch.setattr(
        Answer, "record_logits", lambda self, limit, logits: seen.append(logits) or record(self, limit, logits)
    )
    audit = AuditConfig(sample_ratio=1.0, tokens=20)
    engine = make_engine("exact", with_end(llama, None), audit=audit)
    wanted = engine.generate(PROMPT, max_new_tokens=20, prompt_lookup=False)
    plain = [*seen]
    seen.clear()
    foresee(wanted.token_ids, spoil_one)
    found = engine.generate(PROMPT, max_new_tokens=20)
    assert found.report.accepted_tokens > 0 and found.report.audit is not None and found.report.audit.agrees
    assert [one.shape for one in seen] == [one.shape for one in plain]
    torch.testing.assert_close(torch.cat(seen), torch.cat(plain), atol=2e-4, rtol=1e-3)


def test_what_rounding_may_decide_is_computed_by_itself(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("exact", with_end(llama, None))
    adapter, verify = engine._load().adapter, ModelAdapter.verify

    def verify_badly(*given: Any) -> torch.Tensor:
        """As if passes of several tokens rounded much more: the second best token comes out first."""
        logits = verify(*given).clone()
        first, second = logits.topk(2).indices.unbind(-1)
        rows = torch.arange(len(logits))
        logits[rows, second] = logits[rows, first] + 1e-5 * logits.std()
        return logits

    for options in OPTIONS[:2]:
        wanted = engine.generate(PROMPT, max_new_tokens=20, prompt_lookup=False, **options)
        foresee(wanted.token_ids)
        monkeypatch.setattr(adapter, "verify", lambda *given: verify_badly(adapter, *given))
        found = engine.generate(PROMPT, max_new_tokens=20, **options)
        assert found.report.drafted_tokens > 0
        assert options or (same_answer(found, wanted) and not found.report.accepted_tokens)


def test_draws_are_those_of_multinomial(llama: PreTrainedModel) -> None:
    adapter = ModelAdapter(llama, "off")
    chooser = TokenChooser(adapter, adapter.probe_ids(), SamplingConfig(temperature=1.0, seed=5), None)
    random = torch.Generator().manual_seed(5)
    for logits in torch.randn(20, 1, 50):
        choice = chooser.choose(logits)
        assert chooser.choose(logits, is_verified=True).token_id == choice.token_id, "asked again"
        chooser.add(choice)
        assert choice.token_id == torch.multinomial(choice.scores.softmax(-1), 1, generator=random).item()
    with pytest.raises(RuntimeError, match="probability tensor"):
        chooser.choose(torch.full((1, 50), torch.nan))


def test_a_processor_that_counts_its_calls_gets_no_drafts(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee
) -> None:
    model = with_end(llama, None)
    model.generation_config.guidance_scale = 1.5  # runs the model on the side, once for each token
    plain, drafting = make_engine("exact", model), make_engine("exact", model)
    wanted = plain.generate(PROMPT, max_new_tokens=8, prompt_lookup=False)
    foresee(wanted.token_ids)
    found = drafting.generate(PROMPT, max_new_tokens=8)
    assert same_answer(found, wanted) and found.report.drafted_tokens == 0


def test_a_shortened_cache_gets_no_drafts(make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee) -> None:
    rules, prompt = ReuseConfig(mode="identical", retention_ratio=0.5), " ".join([PROMPT] * 6)
    engine = make_engine(model=with_end(llama, None), reuse=rules)
    wanted = engine.generate(prompt, max_new_tokens=12, prompt_lookup=False)
    foresee(wanted.token_ids)
    found = make_engine(model=with_end(llama, None), reuse=rules).generate(prompt, max_new_tokens=12)
    assert same_answer(found, wanted) and found.report.drafted_tokens == 0
    assert found.report.kv_retained_ratio < 1


def test_without_memory_for_a_draft_the_answer_goes_on(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_end(llama, None)
    plain, drafting = make_engine("exact", model), make_engine("exact", model)
    wanted = plain.generate(PROMPT, max_new_tokens=12, prompt_lookup=False)
    foresee(wanted.token_ids)
    adapter = drafting._load().adapter
    verify = adapter.verify

    def run_out(*given: Any) -> torch.Tensor:
        verify(*given)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(adapter, "verify", run_out)
    found = drafting.generate(PROMPT, max_new_tokens=12)
    assert same_answer(found, wanted) and found.report.accepted_tokens == 0
    require_same_store(drafting, plain)


def test_a_call_that_another_may_join_has_no_drafts(
    make_engine: EngineMaker, llama: PreTrainedModel, foresee: Foresee
) -> None:
    engine = make_engine("exact", with_end(llama, None))
    wanted = engine.generate(PROMPT, max_new_tokens=12, prompt_lookup=False)
    foresee(wanted.token_ids)
    together = engine._load()._together
    other = together.join()
    beside = engine.generate(PROMPT, max_new_tokens=12)
    assert same_answer(beside, wanted) and beside.report.drafted_tokens == 0
    together.leave(other)
    alone = engine.generate(PROMPT, max_new_tokens=12)
    assert same_answer(alone, wanted) and alone.report.accepted_tokens > 0


def test_calls_at_the_same_time_answer_as_each_alone(make_engine: EngineMaker, llama: PreTrainedModel) -> None:
    engine = make_engine("exact", with_end(llama, None))
    prompts = [f"{PROMPT} {PROMPT} {n}" for n in "abc"]
    wanted = [engine.generate(prompt, max_new_tokens=16, prompt_lookup=False).token_ids for prompt in prompts]
    found = engine.generate_batch(prompts, max_new_tokens=16, prompt_lookup=8)
    assert [generation.token_ids for generation in found] == wanted


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match=r"prompt_lookup is 65; accepted is True, False, or 1 to 64 tokens"):
        SamplingConfig(prompt_lookup=65)
    assert SamplingConfig(prompt_lookup=np.int64(3)).prompt_lookup == 3  # type: ignore[arg-type]
    assert SamplingConfig().prompt_lookup is True


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(prompt=tokens, sources=st.lists(tokens, max_size=3), answer=tokens, fixed=st.sampled_from([None, 1, 6]))
def test_a_draft_is_what_once_followed(
    prompt: list[int], sources: list[list[int]], answer: list[int], fixed: int | None
) -> None:
    """It stands in one text, behind the token that came last, whatever the texts are; no longer than there is room."""
    drafter = Drafter(np.array(prompt), [np.array(source) for source in sources], PassCosts(on_cpu=True), fixed)
    for index, token in enumerate(answer):
        drafter.add(token)
        texts = [*sources, [*prompt, *answer[: index + 1]]]
        draft = drafter.propose(5).tolist()
        assert len(draft) <= min(5, fixed or 5)
        wanted = [token, *draft]
        found = [t[i : i + len(wanted)] == wanted for t in texts for i in range(len(t) - len(draft))]
        assert any(found), "no text has it"
        drafter.note_pass(len(draft), 1.0)


@given(seed=st.integers(0, 1000), num=st.integers(1, 400), on_cpu=st.booleans())
def test_drafts_that_fail_are_soon_given_up(seed: int, num: int, on_cpu: bool) -> None:
    """However badly they guess, an answer takes little more than its passes of one token."""
    random, costs = np.random.default_rng(seed), PassCosts(on_cpu=on_cpu)
    prompt = random.integers(0, 3, 300)
    drafter, spent = Drafter(prompt, [], costs), 0.0
    drafter.add(0)
    for _ in range(num):
        draft = drafter.propose(15)
        spent += costs.estimate(len(draft) + 1)
        drafter.note_pass(len(draft), 1.0 if not len(draft) else costs.estimate(len(draft) + 1))
        drafter.add((int(draft[0]) + 1) % 3 if len(draft) else int(random.integers(0, 3)))
    assert spent <= num + 1.5 + 0.01 * num + 1e-6


def test_costs_are_learnt(llama: PreTrainedModel) -> None:
    costs = PassCosts(on_cpu=True)
    assert costs.estimate(1) == 1 and costs.estimate(16) > costs.estimate(4) > 1
    for _ in range(60):
        costs.note(1, 0.1)
        costs.note(8, 0.8)
    assert costs.estimate(8) == pytest.approx(8, rel=0.05)
    assert costs.estimate(4) < 3, "sizes are apart"
