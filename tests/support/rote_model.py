"""A tiny model that has learnt a few dialogues by heart.

LangChain's standard suite asks a model to call ``magic_function(3)`` and the like, which no model of this size can
understand. This one is trained, when the tests start, on the suite's own questions and the answers that it wants, and
on nothing else: it shows that prompts, tools, sampling held to a grammar, and parsing work together end to end. It
says nothing about how well any model uses tools.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from langchain_core.messages import HumanMessage
from langchain_core.tools import BaseTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests.chat_models import magic_function, magic_function_no_args, unicode_customer
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.langchain.messages import translate_messages
from semsharekv_integrations.text.prompt import PromptRenderer
from tool_templates import TAGGED

MOST_STEPS, SURE_LOSS = 400, 0.05  # nats for each token of an answer
# Only the names of tools are shown, so that prompts are short and learnt quickly.
TEMPLATE = TAGGED.replace("{{ tool | tojson", "{{ tool.function.name")


class Dialogue(NamedTuple):
    """A question, the tools at hand, and the answer: a call's name and arguments, or text."""

    question: str
    tools: Sequence[BaseTool]
    answer: tuple[str, dict[str, Any]] | str


@tool
def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return f"Sunny in {location}."


@tool
def greeting_generator(answer_style: str) -> str:
    """Generate a greeting in a particular style of speaking."""
    return f"A {answer_style} greeting."


JOKE = json.dumps({"setup": "Why do cats sleep?", "punchline": "They can."})
CATS = "Tell me a joke about cats."
DIALOGUES = (
    Dialogue(
        "What is the value of magic_function(3)? Use the tool.", [magic_function], ("magic_function", {"input": 3})
    ),
    Dialogue(
        "What is the value of magic_function_no_args()? Use the tool.",
        [magic_function_no_args],
        ("magic_function_no_args", {}),
    ),
    Dialogue(
        "Using the tool, generate a Pirate greeting.",
        [greeting_generator],
        ("greeting_generator", {"answer_style": "Pirate"}),
    ),
    Dialogue(
        "What is the weather in San Francisco, CA?", [get_weather], ("get_weather", {"location": "San Francisco, CA"})
    ),
    Dialogue(
        "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
        [unicode_customer],
        ("unicode_customer", {"customer_name": "你好", "description": "technology"}),
    ),
    Dialogue(
        "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
        [unicode_customer],
        ("unicode_customer", {"customer_name": "こんにちは", "description": "Japanese"}),
    ),
    Dialogue(CATS, [], JOKE),
    Dialogue("Give me the setup to a joke about cats, no punchline.", [], JOKE),
    Dialogue("Give me a joke about cats, include the punchline.", [], JOKE),
    Dialogue(
        f"{CATS} Return the result as a JSON with 'setup' and 'punchline' keys. Return nothing other than JSON.",
        [],
        JOKE,
    ),
)


def rote_tokenizer(shipped: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that ships, with a chat template that knows tools."""
    tokenizer = copy.deepcopy(shipped)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def trained_model(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue] = DIALOGUES) -> PreTrainedModel:
    """A Llama of two layers that knows ``dialogues`` word for word; the same weights at every call.

    Raises:
        RuntimeError: if it has not learnt them within ``MOST_STEPS``.
    """
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = [_row(tokenizer, dialogue) for dialogue in dialogues]
    ids = pad_sequence([row for row, _ in rows], batch_first=True)
    wanted = pad_sequence([answer for _, answer in rows], batch_first=True, padding_value=-1)[:, 1:]
    spoken = wanted >= 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(MOST_STEPS):
        logits = model.lm_head(model.model(input_ids=ids[:, :-1]).last_hidden_state[spoken])
        loss = torch.nn.functional.cross_entropy(logits, wanted[spoken])
        if loss < SURE_LOSS and (logits.argmax(-1) == wanted[spoken]).all():
            return model.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"not learnt within {MOST_STEPS} steps: loss is {loss.item():.3f}")


def _row(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and answer in tokens, and the same with -1 in place of the prompt."""
    renderer = PromptRenderer(tokenizer)
    tools = [convert_to_openai_tool(tool) for tool in dialogue.tools]
    prompt = renderer.render(translate_messages([HumanMessage(dialogue.question)]), {}, tools=tools).token_ids
    said = dialogue.answer
    text = said if isinstance(said, str) else renderer.tool_format.write([said])
    answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor([*prompt, *answer]), torch.tensor([-1] * len(prompt) + answer)
