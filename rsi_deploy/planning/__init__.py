"""Which site gets which form and rank, under a rank, an error, a budget or a plan."""
