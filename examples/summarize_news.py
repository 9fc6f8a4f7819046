"""Summaries of the same news by several outlets: a LangChain chain that computes only what is new.

One storm hit several towns. The articles are summarized, then again in another order, with one of them by another
outlet, and with all of them by it, in its house style:

    python examples/summarize_news.py

Your own texts go into ``editions``. Sentences in another style are read as the first outlet wrote them, as they say the
same. On prompts as short as these, what differs is the share that is computed. The model that ships summarizes one
article well, and two or more less so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from reuse_table import ReuseTable, model_arguments, run
from semsharekv_integrations import SemShareEngine, world
from semsharekv_integrations.langchain import ChatSemShareKV

Articles = Mapping[str, str]  # texts by id
REQUEST = 'Write a concise summary of the following:\n\n\n"{articles}"\n\n\nCONCISE SUMMARY:'


def editions(count: int, seed: int) -> dict[str, Articles]:
    """The same made-up news on ``count`` towns as it comes in, edition by edition."""
    rng = Random(seed)
    towns = rng.sample(world.TOWNS, count)
    news = [world.make_document(rng, town, extra_facts=6) for town in towns]
    news = [replace(article, facts={**article.facts, "event": "a storm"}) for article in news]
    first, *others = texts = {article.town: article.text for article in news}
    return {
        "first edition": texts,
        "in another order": {town: texts[town] for town in reversed(texts)},
        "one by another outlet": {**{town: texts[town] for town in others}, first: restyle(texts[first])},
        "all by another outlet": {town: restyle(text) for town, text in texts.items()},
    }


def restyle(text: str) -> str:
    """The text in another house style: dates with the month first, and no comma behind an opening."""
    return re.sub(r"\b(In|For|To|Around) (\w+),", r"\1 \2", re.sub(r"\b(\d+) ([A-Z][a-z]+)\b", r"\2 \1", text))


def summarizer(engine: SemShareEngine) -> Callable[[Articles], str]:
    """The chain; in your code, ``ChatSemShareKV(model="...", mode="semantic")`` makes the engine by itself."""
    model = ChatSemShareKV(engine=engine, max_tokens=200)
    prompt = ChatPromptTemplate.from_messages([("human", REQUEST)])

    def summarize(articles: Articles) -> str:
        chain = prompt | model.bind(documents=articles) | StrOutputParser()
        return chain.invoke({"articles": "\n\n".join(articles.values())})

    return summarize


def main(argv: Sequence[str] | None = None) -> ReuseTable:
    parser = model_arguments(__doc__, mode="semantic")
    parser.add_argument("--articles", type=int, default=2, help="in each edition (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the articles (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 2 <= args.articles <= 10:
        parser.error(f"--articles is {args.articles}; accepted is 2 to 10")
    table = ReuseTable(args.model, args.mode)
    chain, in_full = summarizer(table.engine), summarizer(table.full)
    for name, articles in editions(args.articles, args.seed).items():
        table.ask(name, chain, in_full, articles)
    table.show()
    return table


if __name__ == "__main__":
    run(main)
