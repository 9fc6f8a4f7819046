"""What may be borrowed, and how much is computed again: matches, plans, budgets.

Everything here is decided from token ids, embeddings and the store's index. It must not know models, frameworks or text
formats: the planner decides, and ``model`` carries the plan out.
"""
