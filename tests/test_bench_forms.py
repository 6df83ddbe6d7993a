"""bench/forms and bench/language_model: variants compute the same, budgets are kept, missed goals are noticed."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import graph_passes as gp
from bench import forms, language_model, repair
from bench.common import UnavailableError, judge
from bench.forms import Row
from graph_passes.forms import largest_rank, split_numbers
from rsi_deploy.runtime.sessions import make_session
from tests.nets import random_llama


@pytest.fixture
def model() -> language_model.LanguageModel:
    """A language model of two blocks with random weights."""
    module = random_llama(128)
    text = torch.randint(64, (6, 96), generator=torch.Generator().manual_seed(0))
    return language_model.LanguageModel(module=module, calibration=text[:4], test=text[4:])


# --- time -----------------------------------------------------------------------------------------------------------


def test_variants_of_a_product_compute_the_same_in_the_numbers_that_they_claim(tmp_path: Path) -> None:
    paths = forms.product_models(64, tmp_path)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    found = {name: make_session(path).run(None, {"x": x})[0] for name, path in paths.items()}
    scale = np.abs(found["dense"]).max()
    assert scale > 1
    assert all(np.abs(y - found["dense"]).max() < 1e-5 * scale for y in found.values())
    models = {name: ir.load(path) for name, path in paths.items()}
    assert [name for name, one in models.items() if any(node.op_type == "Gather" for node in one.graph)] == [
        "scattered"
    ]
    numbers = {name: gp.count_parameters(one) - 64 * forms.OUTPUTS for name, one in models.items()}
    assert numbers["dense"] == numbers["plain"] == 64**2
    assert numbers["one run"] == numbers["folded"] == 3072


def test_a_quick_run_stores_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forms, "QUICK_WIDTHS", (32,))
    monkeypatch.setattr(forms, "QUICK_SECONDS", 0.05)
    assert forms.main(["--quick", "--parts", "time", "--json", "r.json"]) == 0
    stored = json.loads(Path("r.json").read_text())
    assert stored["command"].startswith("python -m bench.forms ")
    assert len(stored["rows"]) == 5 * len(forms.ROWS)
    assert len(stored["goals"]) == len(forms.ROWS)


# --- units ----------------------------------------------------------------------------------------------------------


def test_variants_have_about_the_same_macs() -> None:
    """Fewer units of the MLP alone, or less of every product."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"a": (256, 256), "u": (256, 1024), "v": (1024, 256)}.items()
    }
    text = (
        "g (float[N,256] x) => (float[N,256] y) { h = MatMul(x, a)  i = MatMul(h, u)  j = Relu(i)  y = MatMul(j, v) }"
    )
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    proto = onnx.shape_inference.infer_shapes(proto)
    numbers = sum(array.size for array in weights.values())
    for splits in forms.unit_plans(ir.from_proto(proto), 0.6).values():
        made = ir.from_proto(proto)
        gp.split(
            made,
            lambda site, splits=splits: (
                gp.drawn_factors(site, *splits[site.weight], lambda shape: np.zeros(shape, np.float32))
                if site.weight in splits
                else gp.Dense(reason="")
            ),
        )
        gp.fold_splits(made)
        assert 0.52 < gp.count_parameters(made) / numbers < 0.65


# --- language -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (8, 3)])
@pytest.mark.parametrize("keep", [0.8, 0.6])
def test_ranks_are_the_largest_that_keep_the_share(shape: tuple[int, int], keep: float) -> None:
    ranks = {form: forms.rank_for(form, *shape, keep) for form in ("gemm", "pivoted")}
    for form, rank in ranks.items():
        assert split_numbers(form, *shape, rank) <= keep * math.prod(shape)
        more = split_numbers(form, *shape, rank + 1) > keep * math.prod(shape)
        assert more or rank == largest_rank(form, *shape)
    assert ranks["pivoted"] >= ranks["gemm"]


def test_moments_are_those_of_the_layers_own_inputs(model: language_model.LanguageModel) -> None:
    layers = model.linears()
    assert len(layers) == 14
    assert "lm_head" not in layers
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    found = language_model.input_moments(model.module, model.calibration, list(layers))
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    model.module(model.calibration)
    for name, inputs in seen.items():
        x = torch.cat(inputs).reshape(-1, layers[name].in_features).double()
        second = forms.second_moments(found[name])[0]
        torch.testing.assert_close(second, x.mT @ x / len(x), rtol=1e-4, atol=1e-5 * float(second.abs().max()))
        assert len(found[name].folds) == 4


def test_the_basis_keeps_more_of_the_response_than_that_of_the_weight(model: language_model.LanguageModel) -> None:
    name = "model.layers.1.mlp.down_proj"
    weight = model.linears()[name].weight
    moments = language_model.input_moments(model.module, model.calibration, [name])[name]
    second = forms.second_moments(moments)[0].float()

    def error(basis: torch.Tensor, rank: int) -> float:
        left = basis[:, :rank]
        lost = weight - left @ (left.mT @ weight)
        return float(((lost @ second) * lost).sum())

    basis, plain = forms.whitened_basis(weight, moments), torch.linalg.svd(weight)[0]
    assert error(basis, 128) < 1e-6 * error(basis, 1)
    assert all(error(basis, rank) < error(plain, rank) for rank in (8, 32, 64))


def test_layers_keep_their_share(model: language_model.LanguageModel) -> None:
    rows = forms.measured_language(model, [0.4], calibration=4, test=2)
    assert [row.variant for row in rows] == ["dense", "plain", "pivoted"]
    assert all(0.55 < row.kept <= 0.6 for row in rows[1:])
    for layer in model.linears().values():
        rank = forms.rank_for("pivoted", *layer.weight.shape, 0.6)
        assert int(torch.linalg.matrix_rank(layer.weight, rtol=1e-4)) == rank


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(model: language_model.LanguageModel) -> None:
    model.module.lm_head.weight.zero_()
    assert language_model.perplexity(model.module, model.test) == pytest.approx(64)


def test_repairs_are_measured_on_every_few_layers(model: language_model.LanguageModel) -> None:
    rows = repair.language_rows(model, 5, 4)
    assert [row.site for row in rows] == list(model.linears())[::5]
    assert all(0 < row.both < row.fitted < row.int4 and row.repaired < row.int4 for row in rows)
    assert all(row.repaired_bytes <= 1 + repair.MOST for row in rows)


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"wikitext2|pip install"):
        language_model.smollm2(tmp_path)


# --- goals ----------------------------------------------------------------------------------------------------------


def rows(part: str, case: str, *, kept: float = 0.3, **values: float) -> list[Row]:
    return [
        Row(part=part, case=case, variant=name.replace("_", " "), kept=kept, value=value)
        for name, value in values.items()
    ]


@pytest.mark.parametrize(
    ("measured", "held"),
    [
        (rows("accuracy", "minilm", all=4.0, plain=6.6), True),
        (rows("accuracy", "minilm", all=4.5, plain=6.6), False),
        (rows("accuracy", "cnn_cifar10", all=0.5, plain=0.5), True),
        (rows("accuracy", "cnn_cifar10", all=0.55, plain=3), False),
        (rows("accuracy", "resnet20", kept=0.41, all=1, plain=3), False),
        (rows("accuracy", "cnn_cifar10-macs", all=1.1, plain=1.0), False),
        (rows("accuracy", "lite0", all=0.5, plain=1.0), True),
        (rows("accuracy", "lite0", all=0.51, plain=1.0), False),
        (rows("digits", "digits_vit", all=1.0), True),
        (rows("digits", "digits_vit", kept=0.61, all=0.0), False),
        (rows("units", "vit_b_32, 1 image", units=0.5, plain=0.56), True),
        (rows("units", "vit_b_32, 1 image", units=0.5, plain=0.54), False),
        (rows("time", "1024 wide, 1 row", one_run=0.79, folded=0.8), True),
        (rows("time", "1024 wide, 1 row", one_run=0.79, folded=0.81), False),
        (rows("language", "0.2 removed", plain=60, pivoted=40), True),
        (rows("language", "0.2 removed", plain=60, pivoted=41), False),
    ],
)
def test_missed_goals_are_noticed(measured: list[Row], held: bool) -> None:
    (goal,) = forms.judged(measured)
    assert goal.held == held
    assert judge([goal], check=True) == (0 if held else 4)
