"""What a model's inputs are, and arrays that fit them."""
