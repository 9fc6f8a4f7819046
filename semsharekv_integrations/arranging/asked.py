"""What a caller asks to be arranged, checked, and given back in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

from semsharekv_integrations.errors import IN_UTF8, is_utf8, make_plain, require
from semsharekv_integrations.request import DOCUMENTS, Documents, Request, make_document_id
from semsharekv_integrations.text.prompt import Prompt

SomeDocuments = TypeVar("SomeDocuments", bound=Documents)


class ArrangeOptions(TypedDict, total=False):
    """What a prompt has beside its documents, for ``SemShareEngine.arrange``.

    ``before`` is what stands before the documents: text, or messages whose last one's content ends where they begin.
    None, the default, is to see it from stored prompts that have the documents. Documents that were warmed begin a
    stored prompt of their own; they count only where ``before``, or a stored prompt, says that nothing comes first.
    ``tools`` and ``chat_template_kwargs`` are those of ``GenerateOptions``.
    """

    before: Prompt | None
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


def check_arranging(documents: object, namespace: object, around: ArrangeOptions) -> Request:
    """Return a request with the documents, and what stands before them ("" for None) as its prompt.

    Raises ``ValueError`` for a bad argument. Does not check the messages before the last.
    """
    require(documents is not None, "documents", documents, DOCUMENTS)
    unknown = sorted(around.keys() - ArrangeOptions.__annotations__.keys())
    require(not unknown, "options", unknown, ", ".join(ArrangeOptions.__annotations__))
    before = around.get("before")
    last = before[-1] if isinstance(before, Sequence) and before else before
    text = last.get("content") if isinstance(last, Mapping) else before
    accepted = f"None, a text{IN_UTF8}, or messages, the last one's content ending where the documents begin"
    require(before is None or (isinstance(text, str) and is_utf8(text)), "before", before, accepted)
    others = {name: value for name, value in around.items() if name != "before"}
    options: Any = {**others, "documents": documents, "namespace": namespace}
    return Request.of("" if before is None else before, options)


def reorder_documents(documents: SomeDocuments, order: Sequence[str]) -> SomeDocuments:
    """Return the same documents, in a dict, tuple or list: those of ``order`` in its order, each once, then the rest.

    ``order`` has ids as ``read_documents`` gives them.
    """
    if isinstance(documents, Mapping):
        ids = {make_plain(key): key for key in documents}
        return cast(SomeDocuments, {ids[key]: documents[ids[key]] for key in order})
    left = list(documents)
    digests = [make_document_id(text) for text in left]
    first = [digests.index(key) for key in order]
    found = [left[index] for index in (*first, *(index for index in range(len(left)) if index not in set(first)))]
    return cast(SomeDocuments, tuple(found) if isinstance(documents, tuple) else found)
