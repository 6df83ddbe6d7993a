"""Cost tables: every site cut out of its model, timed dense and split, and kept for the next run."""
