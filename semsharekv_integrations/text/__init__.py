"""Prompts in, answers out: chat templates, tokens and documents in them, tool calls, grammars, streamed text.

Knows no KV, no store and no model, only the tokenizer.
"""

from semsharekv_integrations.versions import require_tested_transformers

require_tested_transformers()
