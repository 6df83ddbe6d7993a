"""The same results as tables on a terminal."""
