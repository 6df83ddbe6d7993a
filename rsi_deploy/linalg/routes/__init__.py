"""The ways to the leading singular subspace of a matrix. `cost_model` chooses between them."""
