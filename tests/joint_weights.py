"""Weights that can share a right factor, and weights that cannot."""

import torch


def related(*outs, width=32, rank=9, noise=0.0, seed=0):
    """Return weights `(1, out, width)` whose stack has rank `rank`, plus noise."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, width, generator=rng) * torch.linspace(1, 0.5, rank)[:, None]
    return [
        torch.randn(1, out, rank, generator=rng) @ rows + noise * torch.randn(1, out, width, generator=rng)
        for out in outs
    ]


def unrelated(*outs, width=32, rank=9):
    """Return weights of rank `rank`, each with its own row space."""
    return [related(out, width=width, rank=rank, seed=seed)[0] for seed, out in enumerate(outs)]
