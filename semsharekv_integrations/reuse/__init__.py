"""What may be borrowed, and how much is computed again: matches, plans, budgets. Knows no model and no framework."""
