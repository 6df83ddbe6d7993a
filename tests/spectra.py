"""Weights with a known spectrum, for the tests of the kernel."""

import torch


def normal(*shape, seed=0, dtype=torch.float32):
    """Return a Gaussian tensor from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(name, n):
    """Return singular values `(n,)`, float64: slow as in trained nets, medium or fast."""
    place = torch.arange(1, n + 1, dtype=torch.float64)
    return {"slow": place**-0.4, "medium": 1 / place, "fast": 0.9 ** (80 * (place - 1) / n), "flat": place**0}[name]


def weight_with(singular, out_features, in_features, seed=0):
    """Return a float64 weight `(out, in)` with these singular values."""
    n = len(singular)
    left = torch.linalg.qr(normal(out_features, n, seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(normal(in_features, n, seed=seed + 1, dtype=torch.float64)).Q
    return (left * singular) @ right.T


def spectral(matrix):
    """Return the exact 2-norm in float64."""
    return float(torch.linalg.matrix_norm(matrix.double(), 2))
