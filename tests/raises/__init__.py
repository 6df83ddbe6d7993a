"""Which raise statements of rsi_deploy and graph_passes the suite reaches: `python -m tests.raises`."""
