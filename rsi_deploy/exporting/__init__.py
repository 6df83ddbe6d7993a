"""One export, step by step: what is given, the steps, what they find, and what is written."""
