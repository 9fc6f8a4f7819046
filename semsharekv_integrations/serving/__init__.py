"""An OpenAI-compatible endpoint over one engine: ``create_app`` makes it, ``semsharekv serve`` runs it.

What OpenAI's API has and a local model has not is refused by name; nothing is ignored in silence. A caller's key is its
tenant. Needs the extra ``serve``; with the extra ``web`` there is a chat page at ``/``. Knows nothing about how KV is
reused.
"""

from semsharekv_integrations.serving.app import create_app
from semsharekv_integrations.serving.settings import ServerConfig

__all__ = ["ServerConfig", "create_app"]
