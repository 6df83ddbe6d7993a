"""One export, step by step: what is given, the run of the steps, what they find, and what is written of it."""
