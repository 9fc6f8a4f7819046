"""Models of images and text, of which the text part answers: text works as with any model, images are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage, ImageBlock
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Blip2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
    T5Config,
)

from semsharekv_integrations import (
    EngineConfig,
    ModelLoadError,
    PromptError,
    ReuseConfig,
    SemShareEngine,
    SemShareError,
    UnsupportedModelError,
)
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.llama_index import SemShareKVLLM as LlamaIndexLLM
from semsharekv_integrations.model.loading import NamedModel
from tiny_models import MULTIMODAL, make_model, make_multimodal

FIRST = "News from Velmar. The mayor of Velmar is Anna Kelsen. " * 3
SECOND = f"{FIRST}Who is the mayor?"
MODES: Any = {mode: EngineConfig(ReuseConfig(mode)) for mode in ("off", "exact")}
PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def save(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes model and tokenizer of a kind to a folder, once."""

    @cache
    def save_once(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        make_multimodal(kind, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save_once


def generate(folder: Path, prompt: str, number: int) -> list[int]:
    """What transformers itself says."""
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=number, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", sorted(MULTIMODAL.keys() - {"paligemma", "llama4"}))
def test_a_text_is_answered_as_generate_answers_it_and_its_prefix_is_reused(
    kind: str, save: Callable[[str], Path]
) -> None:
    whole, folder = generate(save(kind), SECOND, 6), save(kind)
    off, exact = (SemShareEngine.from_pretrained(folder, config) for config in MODES.values())
    assert off.generate(SECOND, max_new_tokens=6).token_ids == whole
    exact.generate(FIRST, max_new_tokens=1)
    again = exact.generate(SECOND, max_new_tokens=6)
    assert again.token_ids == whole
    assert again.report.prefix_tokens > 0.7 * again.report.prompt_tokens
    exact.model.generate(torch.arange(4)[None], max_new_tokens=2)  # by which some kinds keep something of their own
    once_more = exact.generate(SECOND, max_new_tokens=6)
    assert once_more.token_ids == whole
    assert once_more.report.prefix_tokens == once_more.report.prompt_tokens - 1


def test_a_causal_class_of_its_text_part_is_preferred(save: Callable[[str], Path]) -> None:
    """As AutoModelForCausalLM does it: without the images' weights."""
    engine = SemShareEngine.from_pretrained(save("llama4"), MODES["exact"])
    assert type(engine.model).__name__ == "Llama4ForCausalLM"
    first = engine.generate(FIRST, max_new_tokens=1)
    assert engine.generate(FIRST, max_new_tokens=1).token_ids == first.token_ids


def test_a_kind_whose_prompt_sees_what_comes_later_reuses_nothing(save: Callable[[str], Path]) -> None:
    off = SemShareEngine.from_pretrained(save("paligemma"), MODES["off"])
    assert off.generate(SECOND, max_new_tokens=6).token_ids == generate(save("paligemma"), SECOND, 6)
    with pytest.raises(UnsupportedModelError, match="behind a reused prefix"):
        SemShareEngine.from_pretrained(save("paligemma"), MODES["exact"]).generate(FIRST, max_new_tokens=1)


def test_frameworks_take_such_a_folder(save: Callable[[str], Path]) -> None:
    folder = str(save("llava"))
    whole = SemShareEngine.from_pretrained(folder, MODES["off"]).generate(SECOND, max_new_tokens=4).text
    assert SemShareKVLLM(model=folder, max_tokens=4).invoke(SECOND) == whole
    assert LlamaIndexLLM(model=folder, max_tokens=4, is_chat_model=False).complete(SECOND).text == whole
    messages = [{"role": "user", "content": SECOND}]
    said = SemShareEngine.from_pretrained(folder).generate(messages, max_new_tokens=4).text
    assert ChatSemShareKV(model=folder, max_tokens=4).invoke(SECOND).content == said
    assert LlamaIndexLLM(model=folder, max_tokens=4).chat([ChatMessage(SECOND)]).message.content == said


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [False, True])
def test_a_kind_that_needs_an_image_says_so(
    given: bool, mode: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    small = {"hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=8, word_embed_proj_dim=8, ffn_dim=9, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = {**small, "image_size": 28, "patch_size": 14}
    queries = {**small, "encoder_hidden_size": 8}
    config = Blip2Config(vision_config=vision, qformer_config=queries, text_config=text.to_dict(), num_query_tokens=2)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def use(folder: Path) -> None:
        if given:
            SemShareEngine(AutoModelForMultimodalLM.from_pretrained(folder), tokenizer, MODES[mode])
        SemShareEngine.from_pretrained(folder, MODES[mode]).generate("Hi", max_new_tokens=1)

    with pytest.raises(UnsupportedModelError, match="Blip2ForConditionalGeneration takes no text alone"):
        use(tmp_path)


def test_a_text_part_that_is_no_decoder_is_told_by_its_configuration(tmp_path: Path) -> None:
    Blip2Config(text_config=T5Config(vocab_size=99, d_model=8).to_dict()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="not a causal language model but an encoder-decoder"):
        _ = NamedModel(tmp_path, None, "auto", {}).config


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_the_template_of_its_processor_counts_where_the_tokenizer_has_none(
    file: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_multimodal("llava", len(tokenizer)).save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({"chat_template": PARTS_ONLY}))
    source = NamedModel(tmp_path, None, "auto", {})
    assert source.tokenizer.chat_template == PARTS_ONLY
    found = ChatSemShareKV(model=str(tmp_path), max_tokens=1).invoke("The mayor?").usage_metadata
    message = {"role": "user", "content": [{"type": "text", "text": "The mayor?"}]}
    options: Any = {"chat_template": PARTS_ONLY, "add_generation_prompt": True, "return_dict": False}
    rendered = plain.apply_chat_template([message], **options)
    assert found is not None and found["input_tokens"] == len(rendered)


def test_a_damaged_template_of_its_processor_is_said(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    make_multimodal("llava", len(tokenizer)).config.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"its chat_template\.json is damaged"):
        _ = NamedModel(tmp_path, None, "auto", {}).tokenizer


def test_parts_of_text_are_a_text_and_images_are_refused(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = SemShareEngine(llama, tokenizer, MODES["exact"])
    whole = engine.generate([{"role": "user", "content": SECOND}], max_new_tokens=4)
    parts = [{"type": "text", "text": FIRST}, {"type": "text", "text": SECOND.removeprefix(FIRST)}]
    again = engine.generate([{"role": "user", "content": parts}], max_new_tokens=4)
    assert again.token_ids == whole.token_ids
    assert again.report.prefix_tokens == whole.report.prompt_tokens - 1
    images: list[dict[str, Any]] = [{"type": "image", "url": "x.png"}, {"type": "image_url", "image_url": "x.png"}]
    for image in images:
        kind = image.get("type")
        accepted = "accepted is a string, or a list of parts of type 'text' alone"
        with pytest.raises(PromptError, match=rf"messages\[0\].content is list, and \[2\] {kind!r}; {accepted}"):
            engine.generate([{"role": "user", "content": [*parts, image]}])
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    with pytest.raises(ValueError, match=r"messages\[0\].content\[1\].type is 'image_url'"):
        ChatSemShareKV(engine=engine).invoke([HumanMessage([{"type": "text", "text": "What?"}, picture])])
    with pytest.raises(SemShareError, match=r"messages\[0\].blocks\[0\] is 'image'"):
        LlamaIndexLLM(engine=engine).chat([ChatMessage(blocks=[ImageBlock(image=b"aGk=")])])


def test_a_model_of_text_has_no_use_for_a_processor(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert isinstance(make_model("llama", len(tokenizer)).config, LlamaConfig)
    make_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text("{")
    assert NamedModel(tmp_path, None, "auto", {}).tokenizer.chat_template is None


def test_a_model_that_counts_positions_in_its_own_way_is_told_none(tokenizer) -> None:
    """``generate`` leaves them out for Kosmos, whose first token is not at position 0."""
    config = CONFIG_MAPPING["kosmos-2.5"](latent_query_num=4)
    text = {"embed_dim": 32, "layers": 2, "ffn_dim": 37, "attention_heads": 4, "vocab_size": len(tokenizer)}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    for part, changes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in changes.items():
            setattr(part, name, value)
    torch.manual_seed(1)
    model = AutoModelForMultimodalLM.from_config(config).eval().double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    ids = tokenizer(FIRST, return_tensors="pt").input_ids
    told = model.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    adapter = SemShareEngine(model, tokenizer, MODES["off"])._load().adapter
    torch.testing.assert_close(adapter.prefill(ids[0].numpy()).logits, told.logits[0], check_dtype=False)


def test_a_model_whose_preparation_wants_more_than_text_is_told_positions(tokenizer, monkeypatch) -> None:
    model = make_model("llama", len(tokenizer))

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no image")

    monkeypatch.setattr(model, "prepare_inputs_for_generation", fail)
    assert SemShareEngine(model, tokenizer, MODES["exact"])._load().adapter.takes_positions
