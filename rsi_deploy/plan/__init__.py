"""Which site gets which form and rank, from what a user asks for."""
