"""What quality and speed are measured with: a synthetic news world, and the prompts that it reaches a model in."""
