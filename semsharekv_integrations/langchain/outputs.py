"""A finished generation as LangChain reports it: token usage, and details that are plain JSON."""

from __future__ import annotations

from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from semsharekv_integrations.kv import Generation

PROVIDER = "semsharekv"  # LangChain trusts reported usage where this is the model's provider too


def usage_of(generation: Generation) -> UsageMetadata:
    """Token counts; ``cache_read`` is the prompt tokens whose KV was not computed."""
    report = generation.report
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=report.output_tokens,
        total_tokens=report.prompt_tokens + report.output_tokens,
        input_token_details=InputTokenDetails(cache_read=report.reused_tokens),
    )


def details_of(generation: Generation, model_name: str) -> dict[str, Any]:
    """Model, provider, finish reason, and the whole report as ``kv_cache``."""
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": generation.finish_reason,
        "kv_cache": generation.report.to_dict(),
    }
