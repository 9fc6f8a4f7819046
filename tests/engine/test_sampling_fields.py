"""Sampling options stand in one place, ``SamplingConfig``: every way to ask takes each of its fields, also new ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from semsharekv_integrations import SamplingConfig
from semsharekv_integrations.frameworks import describe_fields
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.llama_index import SemShareKVLLM as LlamaIndexLLM
from semsharekv_integrations.request import GenerateOptions

CLASSES = [ChatSemShareKV, SemShareKVLLM, LlamaIndexLLM]
OWN = {"max_new_tokens": "max_tokens"}  # the frameworks' names
A_NEW_FIELD = """
from dataclasses import field, make_dataclass
from semsharekv_integrations import sampling

new = [("min_p", float, field(default=0.0))]
sampling.SamplingConfig = make_dataclass("SamplingConfig", new, bases=(sampling.SamplingConfig,), frozen=True)

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.llama_index import SemShareKVLLM as LlamaIndexLLM

class Asked(BaseException):
    pass

def ask(call):
    try:
        call()
    except Asked as asked:
        return asked.args[0].sampling.min_p

def start(engine, request, *rest):
    raise Asked(request)

SemShareEngine._run, SemShareEngine._load = start, lambda engine: None
found = [ask(lambda: SemShareEngine.from_pretrained("m").generate("x", min_p=0.5))]
for name, cls in (("invoke", ChatSemShareKV), ("invoke", SemShareKVLLM), ("complete", LlamaIndexLLM)):
    for fields, options in (({"min_p": 0.5}, {}), ({"min_p": 0.1}, {"min_p": 0.5})):
        found.append(ask(lambda: getattr(cls(model="m", **fields), name)("x", **options)))
assert found == [0.5] * 7, found
"""


@pytest.mark.parametrize("cls", CLASSES)
def test_framework_classes_have_the_fields_of_the_config(cls: Any) -> None:
    docs, types = describe_fields(SamplingConfig), get_type_hints(SamplingConfig)
    assert docs.keys() == types.keys() and all(docs.values())
    for field in fields(SamplingConfig):
        own = cls.model_fields[OWN.get(field.name, field.name)]
        assert own.description == docs[field.name]
        if field.name != "stop":  # which frameworks leave out by None, and give in lists
            assert own.default == field.default and own.annotation == types[field.name]


def test_the_options_of_generate_begin_with_the_fields_of_the_config() -> None:
    named, types = get_type_hints(GenerateOptions), get_type_hints(SamplingConfig)
    assert list(named)[: len(types)] == list(types)
    assert all(named[name] == kind for name, kind in types.items() if name != "stop")


def test_a_new_field_reaches_generate_langchain_and_llama_index() -> None:
    done = subprocess.run([sys.executable, "-c", A_NEW_FIELD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
