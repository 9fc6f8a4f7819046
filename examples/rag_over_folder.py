"""Questions on a folder of text files: sentence embeddings, FAISS and a LlamaIndex query engine.

The files' KV is computed once, when they are read, so every question reuses it, in whatever order they are found:

    python examples/rag_over_folder.py FOLDER --ask "Who is the mayor?" --model Qwen/Qwen2.5-0.5B-Instruct

Reads *.txt and *.md. Without FOLDER it writes a folder of made-up articles, and asks about them.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import faiss
from llama_index.core import Document, QueryBundle, Settings
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore
from sentence_transformers import SentenceTransformer

from reuse_table import ReuseTable, model_arguments, run
from semsharekv_integrations import world
from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVPostprocessor, SemShareKVWarmer

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


class FaissRetriever(BaseRetriever):
    """The nodes nearest to a question in meaning."""

    def __init__(self, nodes: Sequence[Any], embedder: SentenceTransformer, top_k: int) -> None:
        super().__init__()
        self.nodes, self.embedder, self.top_k = nodes, embedder, min(top_k, len(nodes))
        vectors = embedder.encode([node.text for node in nodes], normalize_embeddings=True)
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = self.embedder.encode([query_bundle.query_str], normalize_embeddings=True)
        [scores], [places] = self.index.search(query, self.top_k)
        return [NodeWithScore(node=self.nodes[i], score=float(s)) for i, s in zip(places, scores, strict=True)]


def write_samples(folder: Path) -> list[str]:
    """Twelve made-up articles, one a file; returns questions on them."""
    rng = Random(7)
    articles = world.make_documents(rng, 12)
    for article in articles:
        (folder / f"{article.town}.txt").write_text(article.text, encoding="utf-8")
    return [question for question, _ in world.converse(rng, articles, 4)]


def read(folder: Path) -> list[Document]:
    """Every text file below ``folder``; raises ``ValueError`` if there are none, or one is not UTF-8."""
    documents = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md")):
        try:
            documents.append(Document(text=path.read_text(encoding="utf-8"), id_=str(path.relative_to(folder))))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"FOLDER is {str(folder)!r}; accepted is a folder with text in *.txt or *.md files")
    return documents


def main(argv: Sequence[str] | None = None) -> ReuseTable:
    parser = model_arguments(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="with *.txt and *.md files")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="on the files; again for more of them")
    parser.add_argument("--embedder", default=EMBEDDER, help="of sentence-transformers (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="passages found for each question (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error(f"--top-k is {args.top_k}; accepted is 1 or more")
    if args.folder and not args.ask:
        parser.error("FOLDER needs --ask QUESTION, at least once")
    try:
        with TemporaryDirectory() as samples:
            asked = [] if args.folder else write_samples(Path(samples))
            documents = read(args.folder or Path(samples))
    except ValueError as error:
        parser.error(str(error))
    try:
        embedder = SentenceTransformer(args.embedder, device="cpu")
    except (OSError, ValueError) as error:
        parser.error(f"--embedder is {args.embedder!r}; accepted is a folder or hub id that can be loaded: {error}")

    table = ReuseTable(args.model, args.mode)
    llm, full = (SemShareKVLLM(engine=engine) for engine in (table.engine, table.full))  # in yours: model="..."
    Settings.tokenizer = llm.tokenize
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=0)
    nodes = IngestionPipeline(transformations=[splitter, SemShareKVWarmer(llm=llm)]).run(documents=documents)
    retriever = FaissRetriever(nodes, embedder, args.top_k)
    engine, in_full = (
        RetrieverQueryEngine.from_args(retriever, llm=one, node_postprocessors=[SemShareKVPostprocessor(llm=one)])
        for one in (llm, full)
    )
    for question in args.ask or asked:
        table.ask(question, engine.query, in_full.query, question)
    table.show()
    return table


if __name__ == "__main__":
    run(main)
