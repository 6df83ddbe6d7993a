import pytest
import torch
from little_memory import LittleMemory
from pydantic import ValidationError

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord, dense_record
from rsi_deploy.linalg.factor_errors import EXACT_SPECTRUM_LIMIT
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Factors, Solution, Solver

SPECTRA = {
    "flat": lambda k: torch.ones(k, dtype=torch.float64),
    "slow": lambda k: torch.arange(1, k + 1, dtype=torch.float64) ** -0.4,
    "linear": lambda k: torch.linspace(1, 0.05, k, dtype=torch.float64),
    "medium": lambda k: torch.arange(1, k + 1, dtype=torch.float64) ** -1.0,
    "fast": lambda k: 0.95 ** torch.arange(k, dtype=torch.float64),
    "step": lambda k: torch.where(torch.arange(k) < 10, 1.0, 0.1).double(),
}


def weight_of(spectrum, out_features, in_features, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    full = min(out_features, in_features)
    left, right = (
        torch.linalg.qr(torch.randn(groups, size, full, generator=generator, dtype=torch.float64)).Q
        for size in (out_features, in_features)
    )
    return (left * SPECTRA[spectrum](full) @ right.mT).float()


def truth(weight, factors):
    """(frobenius, worst spectral, worst normalized error), by SVDs in float64."""
    W = weight.double()
    residual = W - factors.left.double() @ factors.right.double()
    s = torch.linalg.svdvals(W)
    norm = torch.linalg.matrix_norm(residual, 2)
    rank = factors.left.shape[-1]
    return (
        float(residual.norm() / W.norm()),
        float((norm / s[..., 0]).max()),
        float((norm / s[..., rank]).max()),
    )


class Given:
    """A solver that returns the factors it was made with."""

    def __init__(self, factors):
        self.factors = factors

    def solve(self, weight, rank, *, site=""):
        return Solution(self.factors, "direct", 4)


@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "groups"), [((60, 90), 1), ((90, 60), 1), ((20, 36), 4), ((128, 300), 1)])
def test_errors_of_a_small_site_are_exact(shape, groups, spectrum, method):
    weight = weight_of(spectrum, *shape, groups=groups)
    factors, record = factorize_site(weight, 7, Solver(method=method), name="a", kind="Conv2d")
    frobenius, spectral, normalized = truth(weight, factors)
    assert record.normalized_error_kind == "exact"
    assert record.frobenius_error == pytest.approx(frobenius, rel=1e-4)
    assert 0.93 * spectral <= record.spectral_error <= spectral * (1 + 1e-4)
    assert max(1, 0.93 * normalized) <= record.normalized_error <= max(1, normalized) * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(150, 220), (200, 140)])
def test_the_bound_of_a_large_site_is_an_upper_one(shape, spectrum, method, seed):
    assert min(shape) > EXACT_SPECTRUM_LIMIT
    weight = weight_of(spectrum, *shape, seed=seed)
    factors, record = factorize_site(weight, 12 * (seed + 1), Solver(method=method, seed=seed), name="a", kind="Linear")
    frobenius, spectral, normalized = truth(weight, factors)
    assert record.normalized_error_kind == "upper bound"
    assert record.frobenius_error == pytest.approx(frobenius, rel=1e-4)
    assert record.spectral_error == pytest.approx(spectral, rel=0.06)
    # Not below the truth by more than the power iteration leaves, and for good factors of use.
    assert record.normalized_error >= 0.98 * normalized
    if method != "rsvd":
        assert record.normalized_error <= 1.5 * normalized


def test_a_small_optimum_is_not_lost_in_float32():
    """s_{rank+1} is 3e-5 of s_1: a Gram matrix in float32 cannot see it."""
    weight = weight_of("fast", 220, 240)
    factors, record = factorize_site(weight, 200, Solver(method="svd"), name="a", kind="Linear")
    *_, normalized = truth(weight, factors)
    assert record.normalized_error == pytest.approx(normalized, rel=0.1)


@pytest.mark.parametrize("shape", [(40, 60), (150, 220)])
def test_bad_factors_are_seen(shape):
    weight = weight_of("medium", *shape)
    left, right = Solver(method="svd")(weight, 10)
    good = factorize_site(weight, 10, Given(Factors(left, right)), name="a", kind="Linear")[1]
    for bad in (Factors(left * 1.5, right), Factors(left.flip(-1), right), Factors(left, -right)):
        record = factorize_site(weight, 10, Given(bad), name="a", kind="Linear")[1]
        assert record.normalized_error > 3 * good.normalized_error
        assert record.spectral_error > 3 * good.spectral_error


def test_of_groups_the_worst_counts():
    weight = weight_of("fast", 20, 30, groups=3)
    weight[0] *= 10  # each group is measured against its own norm
    left, right = Solver(method="svd")(weight, 6)
    left[1] *= 2.5
    factors = Factors(left, right)
    record = factorize_site(weight, 6, Given(factors), name="a", kind="Conv2d")[1]
    assert record.spectral_error == pytest.approx(1.5, rel=1e-3)
    assert record.normalized_error == pytest.approx(truth(weight, factors)[2], rel=1e-3)
    assert record.normalized_error == pytest.approx(1.5 / 0.95**6, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 20, 30), (4, 9, 12), (1, 140, 150), (1, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_full_rank_is_optimal(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, record = factorize_site(weight, min(shape[1:]), Solver(), name="a", kind="Linear")
    assert record.normalized_error == 1.0
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert record.frobenius_error < tolerance
    assert record.spectral_error < tolerance


def test_a_zero_weight_has_no_error():
    _, record = factorize_site(torch.zeros(1, 30, 20), 4, Solver(), name="a", kind="Linear")
    assert (record.frobenius_error, record.spectral_error, record.normalized_error) == (0.0, 0.0, 1.0)


def test_a_16_bit_site_reports_the_error_of_what_is_stored():
    weight = weight_of("medium", 60, 90).bfloat16()
    factors, record = factorize_site(weight, 30, Solver(method="svd"), name="a", kind="Linear")
    assert factors.left.dtype == torch.bfloat16
    _, spectral, normalized = truth(weight, factors)
    assert record.normalized_error == pytest.approx(normalized, rel=0.05)
    assert record.spectral_error == pytest.approx(spectral, rel=0.05)


def test_the_record_is_complete():
    weight = weight_of("medium", 20, 36, groups=4)
    factors, record = factorize_site(weight, 5, Solver(), name="conv", kind="Conv2d", reason="split", nodes=("conv",))
    assert factors.left.shape == (4, 20, 5)
    assert factors.right.shape == (4, 5, 36)
    expected = {
        "name": "conv",
        "kind": "Conv2d",
        "out_features": 20,
        "in_features": 36,
        "groups": 4,
        "rank": 5,
        "decision": "split",
        "reason": "split",
        "params_dense": 4 * 20 * 36,
        "params_compressed": 4 * 5 * (20 + 36),
        "nodes": ("conv",),
    }
    assert record.model_dump(include=set(expected)) == expected
    assert record.seconds > 0
    assert record.break_even_rank == pytest.approx(20 * 36 / 56)
    assert SiteRecord.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValidationError):
        record.rank = 6


def test_a_dense_record():
    record = dense_record("lm_head", "Linear", 100, 40, "tied", groups=2, nodes=("a", "b"))
    assert (record.decision, record.rank, record.reason) == ("dense", None, "tied")
    assert record.params_dense == record.params_compressed == 2 * 100 * 40
    assert record.frobenius_error is record.spectral_error is record.normalized_error is None
    assert dense_record("node x", "MatMul", 0, 0, "not constant").break_even_rank == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_a_model_error_with_the_way_out(value):
    weight = weight_of("medium", 20, 30)
    weight[0, 3, 3] = value
    with pytest.raises(ModelError, match=r"site 'blocks\.2\.fc': .*1 NaN or infinite.*--exclude 'blocks\.2\.fc'"):
        factorize_site(weight, 4, Solver(), name="blocks.2.fc", kind="Linear")


@pytest.mark.parametrize("of", ["factors", "errors"])
def test_too_little_gpu_memory_is_noted(of):
    weight = weight_of("slow", 300, 400)
    factors, expected = factorize_site(weight, 40, Solver(), name="a", kind="Linear")
    solver = Solver() if of == "factors" else Given(factors)
    with LittleMemory(40_000) as memory:
        again, record = factorize_site(weight, 40, solver, name="a", kind="Linear")
    assert memory.refused > memory.limit
    what = {"factors": "factorized", "errors": "errors measured"}[of]
    assert record.reason == f"split; {what} on the CPU, as the GPU's memory is too small"
    assert torch.equal(again.left, factors.left)
    assert record.residual_interval == pytest.approx(expected.residual_interval, rel=1e-5)
    assert record.normalized_error == pytest.approx(expected.normalized_error, rel=1e-5)
    assert expected.reason == "split"
