"""``semsharekv demo``: a summarization chain, a query engine and a chat, each call beside a full prefill.

``command`` reads arguments and prints, ``models`` chooses the model, ``articles`` is what it reads and is asked,
``parts`` are the frameworks' own chain, query engine and chat, ``flow`` makes the calls, ``table`` words them.
"""
