"""The only importers of transformers' internals: loading, rendering, prefill and decoding.

Versions that were not tested are refused here already, as some cannot even be imported from.
"""

from semsharekv_integrations.versions import require_tested_transformers

require_tested_transformers()
