"""Messages as the text that a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semsharekv_integrations.text.prompt import Message, PromptRenderer, _check_messages
from semsharekv_integrations.text.tool_format import Tool


def render_chat(
    renderer: PromptRenderer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text before it is cut into tokens; a last assistant message is left open, to be continued."""
    return renderer._chat.render(_check_messages(messages), tools, template_kwargs)
