"""Chat templates that write tool calls in the ways of today's model families, and tokenizers that have them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve

SPECIAL = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "<|python_tag|>"]
TAGGED = """{%- if tools %}{{ "<|system|>Tools:\n" }}
{%- for tool in tools %}{{ tool | tojson + "\n" }}{% endfor %}{{ "<|end|>\n" }}{% endif %}
{%- for m in messages %}{{ "<|" + m.role + "|>" }}{% if m.content %}{{ "\n" + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- "}\n</tool_call>" }}
{%- endfor %}{{ "<|end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>\n" }}{% endif %}"""
BARE = """{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|assistant|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|end|>
{%- else %}<|{{ m.role }}|>

{% if tools and loop.index0 == 0 %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>

{% endif %}"""
LISTED = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == "user" %}
{%- if tools and loop.index0 == 0 %}[AVAILABLE_TOOLS] {{ tools | tojson }} {% endif %}
{{- "<|user|> " + m.content + "<|assistant|>" }}
{%- elif m.tool_calls %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 characters") }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}, {% endif %}
{%- endfor %}]<|end|>
{%- elif m.role == "assistant" %} {{ m.content }}<|end|>
{%- elif m.role == "tool" %}<|tool|> {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}
{%- else %}{{ raise_exception("only user, assistant and tool") }}
{%- endif %}
{%- endfor %}"""
TEXT_ARGUMENTS = TAGGED.replace("call.function.arguments | tojson", "call.function.arguments")
TEMPLATES = {"tagged": TAGGED, "bare": BARE, "listed": LISTED, "text arguments": TEXT_ARGUMENTS, "none": None}


@cache
def _shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))


def tool_tokenizer(name: str, *, special: bool = False) -> PreTrainedTokenizerBase:
    """The shipped tokenizer with one of the templates, or its own, which knows no tools.

    ``special`` adds tokens for the marks of all formats.
    """
    tokenizer = copy.deepcopy(_shipped())
    if TEMPLATES[name] is not None:
        tokenizer.chat_template = TEMPLATES[name]
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *SPECIAL]})
    return tokenizer


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    """A tool in OpenAI's form, all of whose arguments are required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOWN = {"type": "string", "maxLength": 8, "pattern": "^[A-Z][a-z]*$"}
NEWS = tool("get_news", "The latest news of a town.", town=TOWN)
WEATHER = tool("weather", "A forecast.", town=TOWN, days={"type": "integer", "minimum": 1, "maximum": 9})
TOOLS = [NEWS, WEATHER]


def calling(call_id: Any, name: str, arguments: Any) -> dict[str, Any]:
    """An assistant message with one call."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}
