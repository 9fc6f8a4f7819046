"""Build the reference model's tokenizer: byte-level BPE in which every name of the world is one token."""

from __future__ import annotations

from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from semsharekv_integrations import world

VOCAB_SIZE = 2048
MAX_CONTEXT_TOKENS = 8192
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
# Words with their leading space, digits one by one, runs of punctuation, runs of white space.
WORD_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build() -> PreTrainedTokenizerFast:
    """Train on every lexicon word and on sampled documents and templates; the same result at every call."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def lexicon() -> list[str]:
    """Every name and noun that a value or a key is made of."""
    groups = (
        world.TOWNS,
        world.NAMES["first_names"],
        world.NAMES["surnames"],
        world.NAMES["companies"],
        world.NAMES["company_forms"],
        world.NAMES["events"],
        world.NAMES["months"],
        world.NAMES["places"],
        world.NAMES["place_looks"],
        world.NAMES["causes"],
        world.NAMES["cause_looks"],
    )
    return [word for group in groups for word in group]


def _corpus() -> list[str]:
    rng = Random(7)
    names = [f" {word}" for word in lexicon() for _ in range(200)]
    statements = [text for kind in world.KINDS.values() for text in (*kind.statements, *kind.questions)]
    templates = [
        *statements,
        *world.HEADLINES,
        *world.FILLERS,
        *world.SYSTEM_WRAPS,
        *world.USER_WRAPS,
        *world.COMPLETION_WRAPS,
        *world.SUMMARY_WRAPS,
        *world.SUMMARY_REQUESTS,
        *world.PLAIN_SYSTEMS,
    ]
    documents = [document.text for _ in range(20) for document in world.make_documents(rng, 100)]
    return names + templates * 20 + documents
