"""Choose a form and a rank for every site, from a rank, an error bound, a budget or a plan file."""
