"""The kernel's options through every door: export, rewrite, compress_ and the command line say and do the same."""

import json

import pytest
import torch
from nets import cnn, mlp, mlp_onnx
from spectra import spectral

from rsi_deploy import compress_, export, rewrite, verify
from rsi_deploy.cli import cli, run
from rsi_deploy.core.errors import UsageError

QUICK = {"measure": False}


@pytest.mark.parametrize("make", [mlp, cnn])
def test_ranks_by_error_are_the_same_both_ways_and_hold(tmp_path, make):
    report = export(make(), tmp_path / "b", max_error="60%", allow_larger=True, **QUICK)
    module = make()
    records = compress_(module, max_error="60%")
    torch_ranks = {record.name: record.rank for record in records if record.rank}
    assert {site.name: site.rank for site in report.split_sites} == torch_ranks
    assert torch_ranks
    weights = dict(make().named_parameters())
    for site in report.split_sites:
        low, high = site.residual_interval
        assert low <= high <= 1.05 * low
        assert site.residual_failure == 0.01
        assert site.reason == "split: the smallest rank that meets --max-error 60%"
        assert site.spectral_error <= 0.6
        if make is mlp:
            assert high <= 0.6 * spectral(weights[f"{site.name}.weight"].detach()) * (1 + 1e-6)
    dense = [site.reason for site in report.sites if site.decision == "dense"]
    assert all("no rank that saves anything meets --max-error 60%" in reason for reason in dense)
    assert report.settings.budget == "--max-error 60%"
    assert verify(tmp_path / "b").ok
    tighter = export(make(), tmp_path / "c", max_error="90%", **QUICK)
    assert sum(s.rank for s in tighter.split_sites) < sum(torch_ranks.values())


@pytest.mark.parametrize("route", ["direct", "chebyshev", "gram", "krylov", "exact"])
def test_a_forced_route_is_taken_and_gives_the_same_bytes_again(tmp_path, route):
    source = mlp_onnx(tmp_path / "m.onnx")
    models = []
    for name in ("a", "b"):
        options = ["--rank", "3", "--route", route, "--no-mixed-precision", "-q", "3", "--no-bench"]
        assert run(["export", str(source), *options, "-o", str(tmp_path / name)]) == 0
        models.append((tmp_path / name / "model.onnx").read_bytes())
    assert models[0] == models[1]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["settings"]["route"], report["settings"]["mixed_precision"]) == (route, False)
    assert {site["route"] for site in report["sites"] if site["rank"]} == {route}
    iterations = {site["power_iterations"] for site in report["sites"] if site["rank"]}
    assert iterations == {{"direct": 3, "chebyshev": 3, "gram": 3, "krylov": 3, "exact": 0}[route]}


def test_automatic_iterations_are_reported(tmp_path):
    source = mlp_onnx(tmp_path / "m.onnx")
    assert run(["export", str(source), "--rank", "4", "-q", "auto", "-o", str(tmp_path / "b"), "--no-bench"]) == 0
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["settings"]["power_iterations"] == "auto"
    assert all(
        site["power_iterations"] == 0 or site["power_iterations"] > 2 for site in report["sites"] if site["rank"]
    )


def test_rewrite_takes_an_error_too(tmp_path):
    source = mlp_onnx(tmp_path / "m.onnx")
    by_error = rewrite(source, tmp_path / "a.onnx", max_error="60%", joint=False)
    exported = export(str(source), tmp_path / "b", max_error="60%", joint=False, **QUICK)
    assert [s.rank for s in by_error.sites] == [s.rank for s in exported.sites]


def test_full_rank_is_exact():
    module = torch.nn.Sequential(torch.nn.Linear(20, 12))
    weight = module[0].weight.detach().clone()
    (record,) = compress_(module, "100%", always_split=True)
    assert record.rank == 12
    assert spectral(weight - module[0].left.detach() @ module[0].right.detach()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"max_error": "0.05"},
        {"max_error": "5%", "rank": 4},
        {"max_error": "5%", "always_split": True},
        {"max_error": "5%", "keep_params": 0.5},
    ],
    ids=str,
)
def test_what_cannot_be_meant(tmp_path, options):
    with pytest.raises(UsageError, match=r"--max-error|--always-split"):
        export(mlp(), tmp_path / "b", **options, **QUICK)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_counts_of_iterations(value):
    assert run(["export", "m.onnx", "--rank", "4", "-q", value, "-o", "b"]) == 2
    assert cli.commands["export"].make_context("export", ["m.onnx", "-q", "auto", "-o", "b"]).params["power_iterations"]
