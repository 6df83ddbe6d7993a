"""Times of other libraries at equal error: arms take turns, and each runs as many iterations as the error needs."""

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsi_deploy.linalg.solver import Factors, Solver, certified_norm

SECONDS, MOST_ROUNDS = 4.0, 40
GPU_SECONDS = 0.5
NEAR = 1.05
Row = dict[str, Any]


def error(weight: Tensor, factors: Factors, values: Tensor, rank: int) -> tuple[float, float, float, bool]:
    """The certified interval of the residual's norm, the normalized error, and whether the interval holds the norm.

    The norm itself is exact up to 1024 on the smaller side; above, it is what 60 steps of Lanczos find from below.
    """
    interval = certified_norm(weight, factors)
    low, high = float(interval.lower), float(interval.upper)
    residual = weight - factors.left @ factors.right
    if min(weight.shape) <= 1024:
        gram = residual.double() @ residual.double().mT if len(weight) <= weight.shape[1] else None
        gram = residual.double().mT @ residual.double() if gram is None else gram
        truth = float(torch.linalg.eigvalsh(gram)[-1]) ** 0.5
    else:
        nothing = Factors(factors.left[:, :0] * 0, factors.right[:0])
        truth = float(certified_norm(residual, nothing, failure=1e-12, width=0.004, seed=1).lower)
    optimum = float(values[rank]) if rank < len(values) else 0.0
    return low, high, truth / optimum if optimum else 1.0, low <= truth * (1 + 1e-6) and truth <= high


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, in shuffled order, after one round to warm up; more rounds where short."""
    order, shuffled = list(arms), random.Random(0)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    begun, least = time.perf_counter(), GPU_SECONDS if torch.cuda.is_initialized() else SECONDS
    for index in range(MOST_ROUNDS + 1):
        if index > rounds and time.perf_counter() - begun > least:
            break
        shuffled.shuffle(order)
        for arm in order:
            _wait()
            started = time.perf_counter()
            arms[arm]()
            _wait()
            if index:
                times[arm].append(time.perf_counter() - started)
    return times


def _wait() -> None:
    """Wait until a GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peers(weight: Tensor, row: Row, *, rounds: int) -> Row:
    """Each peer's least time at an error no larger than the kernel's, over the kernel's own in the same rounds.

    On a GPU torch's own alone: the others have none.
    """
    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd

    rank, target = row["rank"], row["interval"][1]
    array = weight.cpu().numpy()

    def lowrank(steps: int) -> Factors:
        U, S, V = torch.svd_lowrank(weight, q=rank, niter=steps)
        return Factors(U, (V * S).mT)

    def sklearn(steps: int) -> Factors:
        U, S, Vh = randomized_svd(array, rank, n_iter=steps, random_state=0)
        return Factors(torch.from_numpy(U), torch.from_numpy(S[:, None] * Vh))

    def lanczos(_: int) -> Factors:
        U, S, Vh = svds(array, k=rank)
        return Factors(torch.from_numpy(U.copy()), torch.from_numpy(S[:, None] * Vh))

    def svd(_: int) -> Factors:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return Factors(U[:, :rank], S[:rank, None] * Vh[:rank])

    iterated = {"torch.svd_lowrank": lowrank}
    exactly = {"torch.linalg.svd": svd}
    if not weight.is_cuda:
        iterated["sklearn randomized_svd"] = sklearn
        exactly["scipy svds"] = lanczos
    result: Row = {}
    for name, peer in iterated.items():
        steps = next((s for s in (3, 4, 6, 8) if float(certified_norm(weight, peer(s)).lower) <= target), 8)
        reached = float(certified_norm(weight, peer(steps)).lower)
        times = interleaved({"kernel": lambda: Solver()(weight, rank), "peer": lambda: peer(steps)}, rounds)  # noqa: B023
        result[name] = _peer(times, steps=steps, error=reached)
    if min(weight.shape) <= 1024:  # above, goal 3 measures them once
        for name, exact in exactly.items():
            times = interleaved({"kernel": lambda: Solver()(weight, rank), "peer": lambda: exact(0)}, 1)  # noqa: B023
            result[name] = _peer(times, steps=0, error=float(certified_norm(weight, exact(0)).lower))
    return result


def _peer(times: dict[str, list[float]], **facts: Any) -> Row:
    return {"seconds": min(times["peer"]), "speedup": min(times["peer"]) / min(times["kernel"]), **facts}


def near_optimal(weight: Tensor, rank: int, values: Tensor) -> Row:
    """The fewest iterations with a normalized error of at most 1.05, and how much faster that is than an exact SVD."""
    for q in (4, 6, 8, 10, 12, 14, 16):  # between them the kernel does no other number of iterations
        solver = Solver(power_iterations=q)
        times = interleaved({"kernel": lambda: solver(weight, rank)}, 2)["kernel"]  # noqa: B023
        reached = error(weight, solver(weight, rank), values, rank)[2]
        if reached <= NEAR:
            break
    started = time.perf_counter()
    torch.linalg.svd(weight, full_matrices=False)
    _wait()
    seconds = time.perf_counter() - started
    return {"q": q, "normalized_error": reached, "svd_seconds": seconds, "speedup": seconds / min(times)}
