"""One export, step by step: its inputs, its steps, their records, and the files that it writes."""
