"""bench/: the real nets are the ones they claim to be, errors are the kernel's own, and missed goals are noticed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import models, paper
from bench.common import judge
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.linalg.solver import normalized_error
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.model_source import Source

DENSE = {"mlp_mnist": 98.17, "cnn_cifar10": 77.15, "resnet20": 92.30, "resnet56": 94.10}
"""Percent top-1 on the stored subset, by the data folder's SOURCE.txt."""


def loaded(name: str, limit: int | None = None) -> models.Net:
    try:
        return models.load_net(name, limit=limit)
    except models.UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", DENSE)
def test_dense_accuracy_is_the_published_one(name: str) -> None:
    net = loaded(name)
    assert net.score(net.module) == pytest.approx(DENSE[name], abs=0.051)  # one image of 2,000


def test_a_wrong_shortcut_does_not_pass() -> None:
    net = loaded("resnet20", limit=200)
    assert net.score(net.module) > 85
    for module in net.module.modules():
        if isinstance(module, models.PadShortcut):
            module.register_forward_hook(lambda _module, _inputs, output: output.roll(output.shape[1] // 4, dims=1))
    assert net.score(net.module) < 80


def test_the_encoder_knows_a_paraphrase_and_scores_itself_100() -> None:
    pytest.importorskip("transformers", reason="the sentence encoder needs transformers")
    try:
        net = models.load_net("minilm", limit=4)
    except models.UnavailableError as reason:
        pytest.skip(str(reason))
    assert net.score(net.module) == pytest.approx(100, abs=1e-3)
    assert len(net.sites) == 36, "six layers of six linears, no pooler"
    guitar, paraphrase, other = net.module(
        *models.tokenize(["A man is playing a guitar.", "Someone plays the guitar.", "The bread is in the oven."])
    )
    assert guitar @ paraphrase > 0.6
    assert guitar @ other < 0.3


def test_sentences_are_distinct_and_always_the_same() -> None:
    texts = models.sentences()
    assert len(set(texts)) == models.TEXTS
    assert texts == models.sentences()
    assert all(text[0].isupper() and text.endswith(".") and 50 <= len(text) <= 220 for text in texts)


def small_net() -> models.Net:
    """A Conv and two Linears with random weights: nothing has to be on disk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.Flatten(), nn.Linear(24 * 16, 30), nn.Linear(30, 20))
        module = module.eval().requires_grad_(False)
        inputs = torch.randn(16, 8, 4, 4)
    return models.Net(
        name="small",
        module=module,
        batches=((inputs,),),
        reference=module(inputs).argmax(dim=-1),
        metric="top-1",
        sites=models.site_names(module, "Conv2d", "Linear"),
        note="everything",
    )


def test_errors_are_those_of_the_kernel() -> None:
    net = small_net()
    errors = paper.Errors(net)
    module = small_net().module
    records = compress_(module, "30%", method="rsvd")
    assert {record.decision for record in records} == {"split"}
    for record in records:
        factors = paper.stored_factors(module.get_submodule(record.nodes[0]))
        expected = normalized_error(errors.weights[record.name], factors)
        assert expected > 1.05, "RSVD should not look optimal"
        assert errors.of(module, record.name) == pytest.approx(expected, rel=1e-6)


def test_packed_attention_factors_are_found() -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    weight = module[1].self_attn.in_proj_weight.detach().clone()
    compress_(module, "25%", include=["*in_proj_weight"], method="svd")
    factors = paper.stored_factors(module[1].self_attn)
    assert normalized_error(weight, factors) == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def runs() -> list[paper.Run]:
    net = small_net()
    return paper.measure(net, (20, 30), 2, paper.Errors(net))


def test_every_arm_ratio_and_seed_is_measured(runs: list[paper.Run]) -> None:
    keys = [(run.ratio, run.arm, run.seed) for run in runs if run.arm != paper.SVD.name]
    assert sorted(keys) == sorted((ratio, arm.name, seed) for ratio in (20, 30) for arm in paper.Q for seed in (0, 1))
    exact = [run for run in runs if run.arm == paper.SVD.name]
    assert sorted(run.ratio for run in exact) == [20, 30]
    assert [run.error for run in exact] == pytest.approx([1, 1], abs=1e-3)
    assert all(0 < run.kept < 1 and run.seconds > 0 and run.split == run.offered == 3 for run in runs)


def test_goals_reject_doctored_rows(runs: list[paper.Run], capsys: pytest.CaptureFixture[str]) -> None:
    rsvd, q2, q3, q4, exact = paper.summarize(paper.tabulate(runs))
    good = [
        dataclasses.replace(row, error=error, gap=gap)
        for row, error, gap in zip((rsvd, q2, q3, q4, exact), (1.6, 1.3, 1.2, 1.1, 1), (-9, -3, -2, -1, 0), strict=True)
    ]
    assert judge(paper.judged(good), check=True) == 0

    def missed(index: int, **change: float) -> list[str]:
        rows = list(good)
        rows[index] = dataclasses.replace(rows[index], **change)
        goals = paper.judged(rows)
        assert judge(goals, check=True) == 4
        assert judge(goals, check=False) == 0
        return [goal.name[0] for goal in goals if not goal.held]

    assert missed(2, error=1.3) == ["1"], "q = 3 no better than q = 2"
    assert missed(3, gap=-1.01) == ["2"], "q = 4 more than a point below"
    assert missed(0, error=1.26) == ["1", "3"], "RSVD as good as RSI"
    assert "goal missed: 2. q = 4 within 1.0 point of exact SVD: small: -1.01 points" in capsys.readouterr().err


def test_the_command_stores_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load_net", lambda *_, **__: small_net())
    monkeypatch.setattr(paper, "QUICK_RATIOS", (20, 30))
    stored, table = tmp_path / "paper.json", tmp_path / "paper.md"
    arguments = ["--quick", "--nets", "mlp_mnist", "--json", str(stored), "--markdown", str(table)]
    assert paper.main(arguments) == 0
    document = json.loads(stored.read_text())
    assert document["command"] == "python -m bench.paper " + " ".join(arguments)
    assert document["settings"]["quick"] is True
    assert torch.__version__.startswith(document["machine"]["versions"]["torch"])
    assert len(document["rows"]) == 2 * len(paper.ARMS)
    assert len(document["goals"]) == 3
    shown = capsys.readouterr().out
    assert "--quick: 2 ratios" in shown
    assert all(arm.name in shown and arm.name in table.read_text() for arm in paper.ARMS)


def test_an_absent_data_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no net could be loaded"):
        paper.main(["--quick", "--data-root", str(tmp_path)])
    assert "mlp_mnist is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "JSON object"), ('{"n01440764": 1000}', "JSON object"), ("{", "cannot be read")],
)
def test_a_class_map_that_is_none_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        models.read_class_map(file)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two class folders with one picture each."""
    from PIL import Image

    for synset in ("n01440764", "n02102040"):
        (tmp_path / synset).mkdir()
        Image.new("RGB", (300, 260), (90, 120, 30)).save(tmp_path / synset / "0.png")
    return tmp_path


def test_a_subset_of_imagenet_needs_its_class_numbers(pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"has 2 class folders, not ImageNet's 1000.*--classes"):
        paper.main(["--quick", "--imagenet", str(pictures)])
    with pytest.raises(UsageError, match=r"does not name 1 of the folders.*n02102040"):
        models.imagenet_folder(pictures, {"n01440764": 0})
    with pytest.raises(UsageError, match="does not exist"):
        models.imagenet_folder(pictures / "absent")


def test_weights_out_of_reach_are_one_line(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no weights") from OSError("Name or service not known")

    monkeypatch.setattr(models, "load_source", refuse)
    with pytest.raises(models.UnavailableError, match=r"cannot reach its weights \(Name or service not known\)"):
        models.load_imagenet_net("vgg19", pictures, {"n01440764": 0, "n02102040": 217})


def test_labels_follow_the_class_map(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)).eval()
    source = Source(name="stand-in", module=module, preprocessing=Preprocessing(resize=40, crop=(32, 32)))
    monkeypatch.setattr(models, "load_source", lambda *_, **__: source)
    net = models.load_imagenet_net("vit_b_32", pictures, {"n01440764": 0, "n02102040": 217})
    assert net.reference.tolist() == [0, 217]
    assert [tuple(batch.shape) for (batch,) in net.batches] == [(2, 3, 32, 32)]
    assert net.sites == ("2",)
