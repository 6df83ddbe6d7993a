"""Cost tables: the times of every site of a model, dense and split, measured alone and cached."""
