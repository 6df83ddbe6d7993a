"""Find the raise statements of rsi_deploy and graph_passes that no test reaches: `python -m tests.raises`."""
