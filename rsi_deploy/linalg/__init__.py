"""Randomized subspace iteration as in the paper: routes, orthogonalization, certified norms, spectra, error bounds.

This room needs only torch.
"""
