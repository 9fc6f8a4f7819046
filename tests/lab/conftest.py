"""What several tests of the lab need."""

from __future__ import annotations

import pytest

from tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model, as a folder."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", len(tokenizer), max_position_embeddings=4096).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
