"""Batches: in order, with what prompts share computed once, decoded together, and one failure to itself."""

from __future__ import annotations

import uuid

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import ChatPromptTemplate

from semsharekv_integrations import ContextWindowError, SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from tiny_models import EngineMaker

ARTICLE = "News from Velmar. " + "The mayor was born in Osteck. " * 10
PROMPTS = [f"{ARTICLE}{question}" for question in ("Who?", "When was it?", "Why?", "Where did it happen?")]
TOO_LONG = "flood " * 3000
Model = ChatSemShareKV | SemShareKVLLM


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: pytest.FixtureRequest, make_engine: EngineMaker) -> Model:
    return request.param(engine=make_engine("exact"), max_tokens=8)


@pytest.fixture
def widths(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each padded decode step was for."""
    adapter, found = model.engine._load().adapter, []
    step = adapter.decode_padded

    def watched(ids, *rest):
        found.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(adapter, "decode_padded", watched)
    return found


def texts(answers: list) -> list[str]:
    return [getattr(answer, "content", answer) for answer in answers]


def assert_shared(engine: SemShareEngine) -> None:
    """All but the first prompt took the article's KV from it."""
    stats, tokens = engine.stats(), len(engine.tokenizer(ARTICLE)["input_ids"])
    assert stats["requests"] == len(PROMPTS) and stats["reused_tokens"] >= (len(PROMPTS) - 1) * (tokens - 2)


@pytest.mark.parametrize("path", ["batch", "abatch", "generate", "agenerate"])
async def test_every_path_shares_and_decodes_together(model: Model, make_engine, widths: list[int], path: str) -> None:
    alone = type(model)(engine=make_engine("off"), max_tokens=8)
    wanted = texts([alone.invoke(prompt) for prompt in PROMPTS])
    if path == "batch":
        found = texts(model.batch(PROMPTS))
    elif path == "abatch":
        found = texts(await model.abatch(PROMPTS))
    else:
        prompts = [[("human", prompt)] for prompt in PROMPTS] if isinstance(model, ChatSemShareKV) else PROMPTS
        if isinstance(model, ChatSemShareKV):
            prompts = [ChatPromptTemplate.from_messages(prompt).format_messages() for prompt in prompts]
        result = model.generate(prompts) if path == "generate" else await model.agenerate(prompts)
        assert len(result.run) == len(PROMPTS)
        found = [generations[0].text for generations in result.generations]
    assert found == wanted
    assert_shared(model.engine)
    assert max(widths) > 1


@pytest.mark.parametrize("path", ["batch", "abatch"])
async def test_a_failure_takes_no_other_down(model: Model, path: str) -> None:
    async def run(**options):
        inputs = [PROMPTS[0], TOO_LONG, PROMPTS[1]]
        return model.batch(inputs, **options) if path == "batch" else await model.abatch(inputs, **options)

    first, error, last = await run(return_exceptions=True)
    assert isinstance(error, ContextWindowError) and texts([first, last]) == texts(
        [model.invoke(p) for p in PROMPTS[:2]]
    )
    before = model.engine.stats()["requests"]
    with pytest.raises(ContextWindowError, match=r"prompt has (more than )?\d+ tokens; accepted is up to"):
        await run()
    assert model.engine.stats()["requests"] == before + 2, "the others were finished"


def test_a_chain_in_batches(model: Model) -> None:
    chain = ChatPromptTemplate.from_messages([("system", ARTICLE), ("human", "{question}")]) | model
    answers = chain.batch([{"question": question} for question in ("Who?", "When?", "Why?")])
    assert len(answers) == 3 and model.engine.stats()["reused_tokens"] > 2 * 80


def test_runs_of_a_list_of_prompts_have_their_own_ids(make_engine: EngineMaker) -> None:
    model, run_id = ChatSemShareKV(engine=make_engine("exact"), max_tokens=4), uuid.uuid4()
    ended: list[uuid.UUID] = []

    class Listener(BaseCallbackHandler):
        def on_llm_end(self, response, *, run_id, **kwargs):
            ended.append(run_id)

    prompts = [ChatPromptTemplate.from_messages([("human", prompt)]).format_messages() for prompt in PROMPTS]
    result = model.generate(prompts, callbacks=[Listener()], run_id=run_id)
    assert result.run[0].run_id == run_id and len(set(ended)) == len(PROMPTS)
    assert {run.run_id for run in result.run} == set(ended)
