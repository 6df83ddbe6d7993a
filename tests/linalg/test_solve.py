import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from little_memory import LittleMemory
from spectra import normal, spectral, values, weight_with
from torch.profiler import ProfilerActivity, profile

from rsi_deploy.linalg import cost_model as cost
from rsi_deploy.linalg.cost_model import ROUTES
from rsi_deploy.linalg.products import rates
from rsi_deploy.linalg.routes.krylov import depth
from rsi_deploy.linalg.solver import Solver, rsi

FAST_HALF = rates.Rates(full=1e11, onednn=1.0, half=3.05e11, double=5e10, eigen=1e-9)
SHAPES = [(560, 500), (500, 560), (530, 530)]


def error(weight, factors):
    return spectral(weight.double() - factors.left.double() @ factors.right.double())


@pytest.fixture
def fast_half(monkeypatch):
    """A machine with fast bfloat16, whatever this one is, and for small products too."""
    monkeypatch.setitem(rates._set_rates, ("cpu", torch.get_num_threads()), FAST_HALF)
    monkeypatch.setattr("rsi_deploy.linalg.solve.LEAST_LOW_FLOPS", {})


def test_a_second_block_whose_columns_would_hide_in_bfloat16_is_made_in_float32(monkeypatch, fast_half):
    """Half of full rank on a fast spectrum: without, it loses up to 2 % against float32 (1 % here)."""
    weight = weight_with(values("fast", 400), 400, 1200).float()

    def worst():
        found = []
        for seed in range(4):
            both = (Solver(route="chebyshev", mixed_precision=flag, seed=seed)(weight, 200) for flag in (True, False))
            mixed, plain = (error(weight, factors) for factors in both)
            found.append(mixed / plain)
        return max(found)

    assert worst() < 1.003
    monkeypatch.setattr("rsi_deploy.linalg.routes.chebyshev.SHRINKS", math.inf)
    assert worst() > 1.004


@pytest.mark.parametrize("shape", [(1024, 1024), (900, 1500)])
def test_no_block_outlives_its_use(shape):
    """Beyond the weight at most 0.95 of two blocks in float32: one block kept too long is a quarter and more above."""
    weight, solver = normal(*shape), Solver(route="chebyshev", mixed_precision=False)
    solver(weight, 200)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        solver(weight, 200)
    events = recorded.profiler.kineto_results.events()
    most = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert 0.4 < most / (2 * 4 * sum(shape) * 200) < 0.95


def test_bfloat16_is_for_products_that_gain_by_it(monkeypatch):
    monkeypatch.setitem(rates._set_rates, ("cpu", torch.get_num_threads()), FAST_HALF)
    weight = weight_with(values("slow", 520), 700, 520).float()

    def same(rank):
        mixed, plain = (Solver(route="chebyshev", mixed_precision=flag)(weight, rank).left for flag in (True, False))
        return torch.equal(mixed, plain)

    assert same(20)
    assert not same(60)


# -- routes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["slow", "medium", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_as_good_as_the_direct_one(route, shape, name, dtype):
    weight = weight_with(values(name, min(shape)), *shape).to(dtype)
    solution = Solver(route=route, mixed_precision=False).solve(weight, 40)
    assert solution.route == route
    assert solution.power_iterations == {"direct": 4, "chebyshev": 3, "gram": 3, "krylov": 3, "exact": 0}[route]
    left, right = solution.factors
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(left.T @ left, torch.eye(40, dtype=dtype), rtol=0, atol=tolerance)
    turned = shape[0] > shape[1] and route in ("chebyshev", "gram")
    V = torch.linalg.qr(right.T).Q
    projected = weight @ V @ V.T if turned else left @ (left.T @ weight)
    torch.testing.assert_close(left @ right, projected, rtol=0, atol=tolerance)
    optimum = float(values(name, min(shape))[40])
    assert error(weight, solution.factors) / optimum < (1 + 1e-4 if route == "exact" else 1.25)
    one = Solver(method="rsvd").solve(weight, 40)
    assert error(weight, one.factors) / optimum > 1.25


@pytest.mark.parametrize("shape", SHAPES)
def test_chebyshev_and_gram_reach_the_same_subspace(shape):
    weight = weight_with(values("slow", min(shape)), *shape)
    one, gram, other = (
        Solver(route=route, mixed_precision=False, seed=seed).solve(weight, 20).factors
        for route, seed in (("chebyshev", 0), ("gram", 0), ("chebyshev", 1))
    )
    assert float((one.left @ one.right - gram.left @ gram.right).norm()) < 1e-9 * float(weight.norm())
    assert float((one.left @ one.right - other.left @ other.right).norm()) > 1e-3 * float(weight.norm())


def test_a_weight_whose_square_is_not_resolved_is_not_squared():
    weight = weight_with(torch.logspace(0, -6, 520, dtype=torch.float64), 520, 540).float()
    solution = Solver(route="gram", mixed_precision=False).solve(weight, 400)
    assert solution.route == "chebyshev"
    assert error(weight, solution.factors) < 2 * 10 ** (-6 * 400 / 519)
    assert Solver(route="gram", mixed_precision=False).solve(weight, 40).route == "gram"


@pytest.mark.parametrize("q", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["slow", "medium", "fast"])
def test_blocks_stand_for_iterations(name, q):
    weight = weight_with(values(name, 520), 520, 540).float()
    krylov, direct = (
        error(weight, Solver(route=route, power_iterations=q, mixed_precision=False)(weight, 30))
        for route in ("krylov", "direct")
    )
    assert krylov <= 1.02 * direct


def test_krylov_that_does_not_fit_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        solution = Solver(route="krylov").solve(normal(520, 540), 300)
    assert solution.route == "chebyshev"
    assert "block Krylov needs 900 columns of 520" in caplog.text
    assert depth(4) == 3


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_sketch_is_exact_by_every_route(route):
    weight = normal(540, 520)
    solution = Solver(route=route, oversampling=10_000).solve(weight, 30)
    assert solution.route == "exact"
    assert error(weight, solution.factors) == pytest.approx(float(torch.linalg.svdvals(weight)[30]), rel=1e-4)


# -- which route


def test_the_model_takes_what_is_clearly_cheaper():
    chosen = {
        (shape, rank): cost.choose(FAST_HALF, shape, rank, rank, q, mixed=mixed)
        for shape, rank, q, mixed in (
            ((4096, 4096), 205, 4, True),
            ((600, 40000), 20, 32, False),
            ((4096, 50000), 2048, 4, False),
        )
    }
    assert chosen == {
        ((4096, 4096), 205): "chebyshev",
        ((600, 40000), 20): "krylov",
        ((4096, 50000), 2048): "gram",
    }
    quick_eigen = rates.Rates(full=1e11, onednn=1.0, half=1e11, double=9e10, eigen=1e-11)
    assert cost.choose(quick_eigen, (200, 250), 150, 150, 8, mixed=False) == "exact"
    for (out, in_), rank in chosen:
        times = cost.predicted(FAST_HALF, (out, in_), rank, rank, 4, mixed=False)
        assert all(seconds > 0 for seconds in times.values())
        assert cost.predicted(FAST_HALF, (out, in_), rank, rank, 8, mixed=False)["direct"] > times["direct"]


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    rates._rates.cache_clear()
    first = rates.rates(cpu)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text()) | {"eigen": 1.0}
    file.write_text(json.dumps(kept))
    rates._rates.cache_clear()
    assert rates.rates(cpu) == rates.Rates(**kept) != first
    for broken in ("", "{", "[]", '{"full": 1.0}', json.dumps(kept | {"half": -1.0}), json.dumps(kept | {"half": "x"})):
        file.write_text(broken)
        rates._rates.cache_clear()
        assert rates.rates(cpu).eigen < 1e-3, broken
        assert json.loads(file.read_text())["eigen"] < 1e-3
    rates._rates.cache_clear()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path / "file"))
    rates._rates.cache_clear()
    assert rates.rates(torch.device("cpu")).full > 1e6
    rates._rates.cache_clear()


# -- bytes


@pytest.mark.parametrize("shape", [(64, 48), (300, 200), (600, 520)])
@pytest.mark.parametrize(
    "settings", [{}, {"route": "direct"}, {"route": "gram"}, {"method": "rsvd"}, {"mixed_precision": False}]
)
def test_the_number_of_sites_at_once_changes_no_byte(shape, settings, fast_half):
    weights, sites = [normal(*shape, seed=seed) for seed in range(4)], list("abcd")
    solver = Solver(seed=3, **settings)
    together = solver.solve_many(weights, 8, sites=sites)
    for weight, site, (factors, *how) in zip(weights, sites, together, strict=True):
        alone = solver.solve(weight, 8, site=site)
        assert torch.equal(alone.factors.left, factors.left)
        assert torch.equal(alone.factors.right, factors.right)
        assert how[:-1] == [alone.route, alone.power_iterations, ""]
        other = solver(weight, 8, site="z")
        assert not torch.equal(other.left, factors.left) or alone.route == "exact"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_layout_alignment_and_threads_change_no_byte(threads, mixed, fast_half):
    if mixed and threads > 1 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        pytest.skip("bfloat16 products that this CPU emulates depend on the number of threads")
    weight = weight_with(values("slow", 520), 520, 600).float()
    solver = Solver(mixed_precision=mixed, route="direct")
    expected = solver(weight, 30)
    unaligned = torch.empty(weight.numel() + 1)[1:].view(520, 600).copy_(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for view in (weight.T.contiguous().T, unaligned, weight.repeat(1, 2)[:, :600]):
            assert torch.equal(solver(view, 30).left, expected.left)
            assert torch.equal(solver(view, 30).right, expected.right)
    finally:
        torch.set_num_threads(before)


def test_a_memory_mapped_weight_will_do(tmp_path):
    weight = normal(600, 520)
    path = tmp_path / "weight.bin"
    path.write_bytes(weight.numpy().tobytes())
    mapped = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=(600, 520)))
    assert torch.equal(Solver()(mapped, 30).left, Solver()(weight, 30).left)


# -- stopping by error


@pytest.mark.parametrize("name", ["slow", "medium", "fast", "flat"])
@pytest.mark.parametrize("shape", [(300, 400), (600, 520)])
def test_automatic_iterations_stop_where_another_gains_less_than_a_percent(shape, name):
    weight = weight_with(values(name, min(shape)), *shape).float()
    solution = Solver(power_iterations="auto", route="direct", mixed_precision=False).solve(weight, 30)
    done = solution.power_iterations
    assert 2 < done < 40
    here = error(weight, solution.factors)
    more = error(weight, rsi(weight, 30, power_iterations=done + 1))
    assert more > 0.985 * here
    fewer = error(weight, rsi(weight, 30, power_iterations=2))
    assert name == "flat" or fewer > 1.02 * here


# -- bad input


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-30, 1e-15, 1e15, 1e30])
def test_denormal_tiny_and_huge_weights(scale, mixed, route, fast_half):
    weight = weight_with(values("slow", 520), 520, 530).float()
    expected = error(weight, Solver(route=route, mixed_precision=mixed)(weight, 30))
    scaled = weight.double() * scale
    left, right = Solver(route=route, mixed_precision=mixed)(scaled.float(), 30)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    found = spectral(scaled.float().double() / scale - left.double() @ (right.double() / scale))
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("route", ROUTES)
def test_zero_and_rank_deficient_weights(route):
    zero = Solver(route=route)(torch.zeros(520, 530), 30)
    assert not (zero.left @ zero.right).any()
    weight = normal(520, 9) @ normal(9, 530, seed=1)
    left, right = Solver(route=route)(weight, 30)
    assert float((weight - left @ right).norm()) < 1e-5 * float(weight.norm())
    torch.testing.assert_close(left.T @ left, torch.eye(30), rtol=0, atol=1e-5)


def test_factors_that_overflow_are_refused():
    with pytest.raises(ValueError, match="site 'a': the factors do not fit into torch.float32; pass weight.double"):
        Solver(route="direct")(torch.full((600, 600), 3e38), 2, site="a")


@pytest.mark.parametrize("settings", [{}, {"route": "gram"}, {"method": "svd"}, {"method": "rsvd"}], ids=str)
def test_too_little_gpu_memory_moves_the_work_to_the_cpu_with_a_note(settings, caplog):
    weight, solver = normal(600, 520), Solver(**settings)
    expected = solver.solve(weight, 200, site="a")
    with caplog.at_level(logging.WARNING), LittleMemory(100_000) as memory:
        solution = solver.solve(weight, 200, site="a")
    assert memory.refused > memory.limit
    assert solution.note == "factorized on the CPU, as the GPU's memory is too small"
    assert "site 'a': the GPU's memory is too small: factorized on the CPU" in caplog.text
    assert torch.equal(solution.factors.left, expected.factors.left)
    assert torch.equal(solution.factors.right, expected.factors.right)
    with LittleMemory(100_000_000) as memory:
        assert solver.solve(weight, 200).note == ""
    assert not memory.refused


@pytest.mark.gpu
def test_out_of_memory_on_the_gpu_falls_back_to_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = normal(3000, 2000).cuda()
    torch.cuda.empty_cache()
    total, room = torch.cuda.get_device_properties(0).total_memory, 50 << 20  # for the factors, 30 MB, not for the work
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        solution = Solver(route="direct").solve(weight, 1500)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert solution.note == "factorized on the CPU, as the GPU's memory is too small"
    assert solution.factors.left.is_cuda
    assert Solver(route="direct").solve(weight, 1500).note == ""
