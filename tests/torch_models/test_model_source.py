import re
import sys
import urllib.error

import pytest
import torch
import torchvision
from nets import mlp_onnx
from safetensors.torch import save_file
from torch import nn

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.exporting.timing.profile import write_dense
from rsi_deploy.runtime.feeds.shapes import input_shapes, parse_shape
from rsi_deploy.torch_models.model_source import load_source, source_of_module

SMALL = "torchvision:squeezenet1_1"  # 5 MB of weights


# -- torchvision


def test_a_torchvision_model_with_random_weights():
    source = load_source(SMALL, weights="none")
    assert source.name == SMALL
    assert isinstance(source.module, nn.Module)
    assert not source.module.training
    assert source.program is source.onnx is None
    (x,) = source.example_inputs
    assert x.shape == (2, 3, 224, 224)
    assert source.preprocessing.crop == (224, 224)
    assert source.preprocessing.mean == (0.485, 0.456, 0.406)
    assert any("random" in note for note in source.notes)


def weights_of(source):
    return torch.cat([p.flatten() for p in source.module.parameters()])


def test_random_weights_depend_on_the_seed_and_not_on_the_global_one():
    torch.manual_seed(1)
    first = load_source(SMALL, weights="none", seed=3)
    state = torch.manual_seed(2).get_state()
    again = load_source(SMALL, weights="NONE", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = load_source(SMALL, weights="none", seed=4)
    assert torch.equal(weights_of(first), weights_of(again))
    assert torch.equal(first.example_inputs[0], again.example_inputs[0])
    assert not torch.equal(weights_of(first), weights_of(other))
    assert not torch.equal(first.example_inputs[0], other.example_inputs[0])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "resnet18"),
        ("vgg-19", "vgg19"),
        ("ResNet50", "resnet50"),
        ("", "none is near"),
        ("@@", "none is near"),
    ],
)
def test_near_names(name, near):
    with pytest.raises(UsageError, match=rf"torchvision has no model '{name}'; near names: ") as caught:
        load_source(f"torchvision:{name}")
    assert near in str(caught.value)


def test_weights_from_a_file(tmp_path):
    theirs = load_source(SMALL, weights="none", seed=8)
    save_file(theirs.module.state_dict(), tmp_path / "w.safetensors")
    mine = load_source(SMALL, weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(weights_of(mine), weights_of(theirs))
    assert not any("random" in note for note in mine.notes)


def test_weights_from_a_file_that_is_not_there_or_does_not_fit(tmp_path):
    with pytest.raises(UsageError, match=r"w\.pth.* is no file, and none of DEFAULT, none, IMAGENET1K"):
        load_source(SMALL, weights=str(tmp_path / "w.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="does not fit SqueezeNet"):
        load_source(SMALL, weights=str(tmp_path / "w.pth"))


def test_torchvision_takes_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="as --weights FILE, not --checkpoint"):
        load_source(SMALL, weights="none", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), urllib.error.HTTPError("u", 403, "Forbidden", {}, None), TimeoutError("slow")],
    ids=["url", "http", "timeout"],
)
def test_weights_that_cannot_be_downloaded(monkeypatch, error):
    def get_state_dict(self, **_):
        raise error

    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(ModelError, match=r"weights of torchvision:squeezenet1_1 cannot be downloaded") as caught:
        load_source(SMALL)
    for part in ("https://download.pytorch.org/", "--weights FILE", "--weights none"):
        assert part in str(caught.value)


def test_downloaded_weights_are_loaded(monkeypatch):
    theirs = load_source(SMALL, weights="none", seed=8)
    seen = {}

    def get_state_dict(self, **options):
        seen.update(options)
        return theirs.module.state_dict()

    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights, "get_state_dict", get_state_dict)
    assert torch.equal(weights_of(load_source(SMALL)), weights_of(theirs))
    assert seen["check_hash"] is True


def test_another_input_shape_for_torchvision():
    source = load_source(SMALL, weights="none", input_shape="1x3x96x128")
    assert source.example_inputs[0].shape == (2, 3, 96, 128)


# -- factories

FACTORIES = """
import torch
from torch import nn
from rsi_deploy.data.preprocess import Preprocessing

def make_model():
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 2))

def make_told():
    model = make_model()
    model.input_shape = (1, 6)
    model.preprocessing = {"scale": 0.5}
    return model

def make_with_inputs():
    model = make_model()
    model.example_inputs = torch.ones(3, 6)
    return model

def make_failing():
    raise RuntimeError("disk is full")

def make_text():
    return "a model"

def make_sized(size):
    return nn.Linear(size, size)

class Net(nn.Module):
    input_shape = (1, 6)
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)
    def forward(self, x):
        return self.fc(x)

constant = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A package of factories in the current folder, whose name no other test has imported."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for module in (name, f"{name}_broken"):
        sys.modules.pop(module, None)


def test_a_factory_with_an_input_shape(factories):
    source = load_source(f"{factories}:make_model", input_shape="1x6")
    assert source.name == f"{factories}:make_model"
    assert not source.module.training
    assert source.example_inputs[0].shape == (2, 6)
    assert source.preprocessing is None
    assert source.notes == ["no --checkpoint: the weights are those the factory made"]


def test_inputs_that_the_module_declares(factories):
    source = load_source(f"{factories}:make_told")
    assert source.example_inputs[0].shape == (2, 6)
    assert source.preprocessing == Preprocessing(scale=0.5)
    assert load_source(f"{factories}:make_told", input_shape=(1, 3, 6)).example_inputs[0].shape == (2, 3, 6)
    inputs = load_source(f"{factories}:make_with_inputs").example_inputs
    assert len(inputs) == 1
    assert torch.equal(inputs[0], torch.ones(3, 6))
    assert load_source(f"{factories}:make_with_inputs", input_shape="1x6").example_inputs[0].shape == (2, 6)


def test_a_class_is_a_factory(factories):
    assert load_source(f"{factories}:Net").module.fc.out_features == 2


def test_a_factory_is_seeded_and_leaves_the_global_seed_alone(factories):
    state = torch.manual_seed(1).get_state()
    first = load_source(f"{factories}:Net", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(weights_of(first), weights_of(load_source(f"{factories}:Net", seed=3)))
    assert not torch.equal(weights_of(first), weights_of(load_source(f"{factories}:Net", seed=4)))


def test_a_factory_with_a_checkpoint(factories, tmp_path):
    theirs = load_source(f"{factories}:Net", seed=8)
    torch.save({"model": theirs.module.state_dict()}, tmp_path / "w.pth")
    mine = load_source(f"{factories}:Net", checkpoint=tmp_path / "w.pth")
    assert torch.equal(weights_of(mine), weights_of(theirs))
    assert mine.notes == []
    with pytest.raises(ModelError, match=r"w\.pth does not fit Sequential"):
        load_source(f"{factories}:make_model", checkpoint=tmp_path / "w.pth", input_shape="1x6")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{0}_nowhere:make_model", UsageError, "cannot import '{0}_nowhere'"),
        ("{0}.deeper:make_model", UsageError, "cannot import '{0}.deeper'"),
        ("{0}_broken:make_model", UsageError, "No module named 'no_such_module_here'"),
        ("{0}:make_modle", UsageError, "has no factory 'make_modle'; near names: make_model"),
        ("{0}:zzz", UsageError, "has no factory 'zzz'"),
        ("{0}:constant", UsageError, "has no factory 'constant'"),
        ("{0}:make_failing", ModelError, "the factory {0}:make_failing failed: RuntimeError: disk is full"),
        ("{0}:make_sized", ModelError, "failed: TypeError: make_sized() missing 1 required positional argument"),
        ("{0}:make_text", ModelError, "must return a torch.nn.Module, but returned str"),
        ("{0}:make_model", UsageError, "{0}:make_model declares no input shape: add --input-shape"),
    ],
)
def test_factories_that_do_not_work(factories, spec, error, message):
    with pytest.raises(error) as caught:
        load_source(spec.format(factories))
    assert message.format(factories) in str(caught.value)


# -- files


def test_a_pt2_file(tmp_path):
    model = nn.Linear(6, 2).eval()
    x = torch.randn(3, 6)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    source = load_source(str(tmp_path / "model.pt2"))
    assert source.name == "model.pt2"
    assert source.module is source.onnx is None
    assert torch.equal(source.example_inputs[0], x)
    assert torch.equal(source.program.module()(x), model(x))
    with pytest.raises(UsageError, match="--checkpoint goes with a factory"):
        load_source(str(tmp_path / "model.pt2"), checkpoint="w.pth")


@pytest.mark.filterwarnings("ignore")
def test_pt2_files_that_do_not_work(tmp_path):
    class Keyword(nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    program = torch.export.export(Keyword(), (torch.ones(2),), {"scale": torch.ones(2)})
    torch.export.save(program, tmp_path / "keyword.pt2")
    with pytest.raises(ModelError, match=r"keyword\.pt2 takes keyword inputs \(scale\)"):
        load_source(str(tmp_path / "keyword.pt2"))
    program = torch.export.export(nn.Linear(6, 2), (torch.ones(3, 6),))
    program.example_inputs = None
    torch.export.save(program, tmp_path / "bare.pt2")
    with pytest.raises(ModelError, match=r"bare\.pt2 carries no example inputs; export it again with torch\.export"):
        load_source(str(tmp_path / "bare.pt2"))
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(ModelError, match=r"text\.pt2 is not a readable torch\.export archive"):
        load_source(str(tmp_path / "text.pt2"))


def test_an_onnx_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not looked at here")
    source = load_source(str(path))
    assert source.onnx == path
    assert source.module is source.program is None
    with pytest.raises(UsageError, match="--checkpoint goes with a factory"):
        load_source(str(path), checkpoint="w.pth")


@pytest.mark.parametrize("name", ["no.onnx", "no.pt2"])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(UsageError, match=rf"no such file: .*{name}"):
        load_source(str(tmp_path / name))


@pytest.mark.parametrize("model", ["resnet18", "", "model.h5", "model.pth", "./folder"])
def test_other_forms_are_refused_with_the_known_ones(model):
    with pytest.raises(UsageError) as caught:
        load_source(model)
    for part in (f"MODEL {model!r}", "torchvision:NAME", "package.module:factory", "FILE.pt2", "FILE.onnx"):
        assert part in str(caught.value)


def test_a_file_of_another_kind_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "model.h5").write_text("")
    with pytest.raises(UsageError) as caught:
        load_source(str(tmp_path / "model.h5"))
    assert "no such file" not in str(caught.value)


# -- shapes, and modules at hand


def test_a_shape_that_no_input_takes_is_refused(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="--input-shape input=1x12"):
        load_source(str(path), input_shape="1x12")
    assert load_source(str(path)).onnx == path
    with pytest.raises(UsageError, match="--input-shape input=1x12"):
        write_dense(str(path), tmp_path / "d.onnx", "DEFAULT", None, "1x12", 0)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.ones(2, 6),)), tmp_path / "p.pt2")
    with pytest.raises(UsageError, match="leave out --input-shape"):
        load_source(str(tmp_path / "p.pt2"), input_shape="1x6")
    with pytest.raises(UsageError, match="one shape without a name, but got 1x6, 1x7"):
        input_shapes(["1x6", "1x7"])
    assert input_shapes(["1x6", "y=1x7"]) == ("1x6", {"y": (1, 7)})


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1x3x32x32", (1, 3, 32, 32)),
        ("8", (8,)),
        ("1X16", (1, 16)),
        ("1x0x48", (1, 0, 48)),
        ((2, 3), (2, 3)),
        (None, None),
    ],
)
def test_shapes(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "x", "1x", "1xx3", "-1x3", "axb", "1,3,32,32", "1x3.5", "3 32"])
def test_shapes_that_cannot_be_meant(text):
    with pytest.raises(UsageError, match=r"--input-shape must be positive numbers joined by x, such as 1x3x32x32"):
        parse_shape(text)


def test_a_module_at_hand():
    model = nn.Sequential(nn.Linear(6, 2)).train()
    source = source_of_module(model, "1x6", seed=3)
    assert source.module is model
    assert not model.training
    assert source.name == "Sequential"
    assert source.example_inputs[0].shape == (2, 6)
    assert torch.equal(source.example_inputs[0], source_of_module(model, (1, 6), seed=3).example_inputs[0])
    with pytest.raises(UsageError, match="Sequential declares no input shape"):
        source_of_module(model)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (":f", {}, UsageError, "is spelled package.module:factory"),
        (".relative:f", {}, UsageError, "is spelled package.module:factory"),
        ("raises_on_import:f", {}, ModelError, "importing 'raises_on_import' failed: ZeroDivisionError"),
        ("wrong_preprocessing:f", {}, ModelError, "Net.preprocessing: layout"),
        ("shaped:f", {}, None, ""),
        ("shaped:f", {"weights": "none"}, UsageError, "--weights goes with torchvision:NAME"),
        (SMALL, {"weights": "none", "input_shape": "3"}, UsageError, "such as 1x3x224x224"),
        (SMALL, {"weights": "none", "input_shape": (1, 3, -2, 8)}, UsageError, "--input-shape must be positive"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, UsageError, "is no image classifier"),
    ],
)
def test_mistakes_are_reported_as_errors(tmp_path, monkeypatch, model, options, error, message):
    net = "from torch import nn\nclass Net(nn.Linear):\n    {}\ndef f():\n    return Net(2, 2)\n"
    (tmp_path / "raises_on_import.py").write_text("1 / 0\n")
    (tmp_path / "wrong_preprocessing.py").write_text(
        net.format("input_shape = (1, 2); preprocessing = {'layout': 'X'}")
    )
    (tmp_path / "shaped.py").write_text(net.format("input_shape = '1x2'"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if error is None:
        assert load_source(model, **options).example_inputs[0].shape == (2, 2)
        return
    with pytest.raises(error, match=re.escape(message)):
        load_source(model, **options)
