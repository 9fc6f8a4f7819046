"""The order of documents that continues what is stored, and what it spared. Computes no KV."""

from semsharekv_integrations.arranging.asked import ArrangeOptions, SomeDocuments, check_arranging, reorder_documents
from semsharekv_integrations.arranging.notes import Arrangement, Arrangements, find_given_order
from semsharekv_integrations.arranging.orders import Text, find_order

__all__ = [
    "ArrangeOptions",
    "Arrangement",
    "Arrangements",
    "SomeDocuments",
    "Text",
    "check_arranging",
    "find_given_order",
    "find_order",
    "reorder_documents",
]
