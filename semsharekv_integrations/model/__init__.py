"""The model: loading it, its state, prefill of all or some rows, decoding. Knows no prompts, stores or frameworks.

With ``text`` the only importer of transformers' internals. Versions that were not tested are refused here already, as
some cannot even be imported from.
"""

from semsharekv_integrations.versions import require_tested_transformers

require_tested_transformers()
