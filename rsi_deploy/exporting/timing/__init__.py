"""What time decides in an export: cost tables, latency budgets, and splits that are undone because they are slower."""
