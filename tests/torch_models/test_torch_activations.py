"""`TorchActivations` against brute force: plain hooks, whole patch matrices and real compressed modules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_passes import forms
from rsi_deploy.calibration.activations import ModelActivations, Replacement, distance_samples
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.torch_models.calibration import rows as torch_rows
from rsi_deploy.torch_models.calibration.activations import TorchActivations
from rsi_deploy.torch_models.calibration.rows import find_mask
from rsi_deploy.torch_models.calibration.trace import staged
from rsi_deploy.torch_models.module_sites import find_module_sites, replace_site_
from tests import nets


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# -- brute force


def everything(*shape):
    """As many rows as there are."""
    return 10**9


def batches_of(*shape, count=3):
    data = [(torch.randn(shape),) for _ in range(count)]
    return lambda: iter(data)


def activations_of(module, batches, **options):
    return TorchActivations(module, batches, **{"rows": everything, **options})


def inputs_of(module, path, batches):
    """What the layer at `path` reads and gives, a batch each, by plain hooks."""
    found = []
    handle = module.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, output: found.append(
            (
                (args or tuple(kwargs.values()))[0].clone(),
                output[0].clone() if isinstance(output, tuple) else output.clone(),
            )
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches():
            module(*batch)
    handle.remove()
    return found


def rows_of(layer, x):
    """All rows `(groups, rows, in)` that a layer multiplies, by whole patch matrices."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return x.reshape(1, -1, x.shape[-1])
    x = F.pad(x, layer._reversed_padding_repeated_twice)
    axes = len(layer.kernel_size)
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (layer.groups, -1))  # N, groups, in, *positions, *kernel
    order = (1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    return x.permute(order).reshape(layer.groups, -1, layer.weight[0].numel())


def outputs_of(layer, y):
    """All rows `(groups, rows, out)` of an output-shaped tensor."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return y.reshape(1, -1, y.shape[-1])
    return y.movedim(1, -1).reshape(-1, layer.groups, y.shape[1] // layer.groups).transpose(0, 1)


def expected_moments(x, y):
    """Of rows `x (groups, rows, in)` and `y (groups, rows, out)`."""
    x, y = x.double(), y.double()
    a, b = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    rows = x.shape[1]
    return Moments(
        rows=rows,
        mass=float(rows),
        mean_x=x.mean(1),
        mean_y=y.mean(1),
        xx=a.mT @ a / rows,
        yx=b.mT @ a / rows,
        yy=b.square().sum((1, 2)) / rows,
    )


def weight_of(layer):
    return layer.weight.detach().reshape(getattr(layer, "groups", 1), -1, layer.weight[0].numel())


def dense_moments(module, path, batches):
    layer = module.get_submodule(path)
    x = torch.cat([rows_of(layer, x) for x, _ in inputs_of(module, path, batches)], dim=1)
    return expected_moments(x, x @ weight_of(layer).mT)


def assert_moments(found, expected):
    assert found.rows == expected.rows
    for name in ("mean_x", "mean_y", "xx", "yx", "yy"):
        torch.testing.assert_close(
            getattr(found, name).double(),
            getattr(expected, name),
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_other_moments(found, expected):
    with pytest.raises(AssertionError):
        assert_moments(found, expected)


def surveyed(activations):
    found = {}
    activations.survey(lambda site, moments: found.update({site.name: moments}))
    return found


def sequenced(activations, become=lambda site, moments: None):
    found = {}

    def visit(site, moments):
        found[site.name] = moments
        return become(site, moments)

    activations.sequence(visit)
    return found


def replacement_of(module, name, rank=1, form=None, bias=0.3):
    """Some low-rank replacement of a site, by the weight alone."""
    (site,) = (s for s in find_module_sites(module) if s.name == name)
    form = form or site.forms[0]
    weight = site.matrix().reshape(site.groups, site.shape[0], -1, *site.kernel)
    matrix = site.matrix() if not site.kernel else torch.from_numpy(forms.unfold(weight.numpy(), form).copy())
    left, right = Solver()(matrix, rank, site=name)
    return Replacement(form, left, right, torch.full((site.groups, site.shape[0]), bias))


def really(module, replacements):
    """A copy with the low-rank modules in place."""
    other = copy.deepcopy(module)
    for site in find_module_sites(other):
        if site.name in replacements:
            replace_site_(other, site, replacements[site.name])
    return other


# -- models


class Tokens(nn.Module):
    """Takes embeddings and a mask that it does not even read."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x, *masks):
        return self.down(torch.relu(self.up(x)))


CONVS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    "1d same": (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3), (2, 4, 6, 5)),
    "2d strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 4, 7, 8)),
    "2d dilated": (nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2, bias=False), (2, 4, 6, 6)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (2, 4, 6, 6)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "3d": (nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 2, 3, 5, 4)),
}


def conv_net(case):
    conv, shape = CONVS[case]
    conv = copy.deepcopy(conv)
    pointwise = type(conv)(conv.out_channels, 5, 1)
    return nn.Sequential(conv, nn.ReLU(), pointwise).eval(), batches_of(*shape)


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)).eval()


# -- survey


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("case", CONVS)
def test_a_survey_of_convolutions_is_that_of_all_patches(case):
    module, batches = conv_net(case)
    activations = activations_of(module, batches)
    found = surveyed(activations)
    assert list(found) == ["0", "2"]
    for name, moments in found.items():
        assert_moments(moments, dense_moments(module, name, batches))
    x = torch.cat([rows_of(module[0], x) for x, _ in inputs_of(module, "0", batches)], dim=1)
    if x.shape[-1] > 1:
        wrong = x.flip(-1)  # the columns in another order
        assert_other_moments(found["0"], expected_moments(wrong, x @ weight_of(module[0]).mT))
    assert activations.sites[0].forms == find_module_sites(module)[0].forms


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 5, 6)], ids=str)
def test_a_survey_of_linears_is_that_of_all_rows(shape):
    module, batches = mlp(), batches_of(*shape)
    found = surveyed(activations_of(module, batches))
    assert list(found) == ["0", "2", "4"]
    for name, moments in found.items():
        assert_moments(moments, dense_moments(module, name, batches))
    assert_other_moments(found["0"], dense_moments(module, "0", batches_of(*shape)))


def test_a_survey_of_a_transformers_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module, batches = nn.Sequential(conv1d(9, 6)).eval(), batches_of(2, 5, 6)
    ((_, moments),) = surveyed(activations_of(module, batches)).items()
    x = torch.cat([x.reshape(1, -1, 6) for (x,) in batches()], dim=1)
    assert_moments(moments, expected_moments(x, x @ module[0].weight.detach()))


@pytest.mark.parametrize("case", ["1d", "2d grouped", "3d"])
def test_pieces_change_nothing(case, monkeypatch):
    module, batches = conv_net(case)
    whole = surveyed(activations_of(module, batches))
    monkeypatch.setattr(torch_rows, "PIECE_BYTES", 1)
    for name, moments in surveyed(activations_of(module, batches)).items():
        assert_moments(moments, whole[name])
    for name, moments in sequenced(activations_of(module, batches)).items():
        assert_moments(moments, whole[name])


def test_little_memory_takes_more_runs_and_finds_the_same():
    module, batches = mlp(), batches_of(4, 6)
    runs = []
    module[0].register_forward_pre_hook(lambda *_: runs.append(0))
    one = surveyed(activations_of(module, batches))
    assert len(runs) == 1 + 3  # a trace, and a run of every batch
    found = surveyed(activations_of(module, batches, memory=1))
    assert len(runs) == 4 + 1 + 3 * 3
    assert list(found) == list(one)
    for name, moments in found.items():
        assert_moments(moments, one[name])


def test_runs_stop_after_the_last_site():
    module, batches = mlp(), batches_of(4, 6)
    runs = []
    module[4].register_forward_pre_hook(lambda *_: runs.append(0))
    activations = activations_of(module, batches, memory=1)
    before = len(runs)
    surveyed(activations)
    assert len(runs) - before == 3  # its own


def test_wide_sites_keep_their_rows():
    module, batches = nn.Sequential(nn.Linear(8200, 3)).eval(), batches_of(5, 8200)
    found = surveyed(TorchActivations(module, batches))["0"]
    assert isinstance(found, Samples)
    x = torch.cat([x for (x,) in batches()])
    torch.testing.assert_close(found.x[0], x)
    torch.testing.assert_close(found.y[0], x @ module[0].weight.detach().T, rtol=1e-4, atol=1e-4)
    again = sequenced(TorchActivations(module, batches))["0"]
    torch.testing.assert_close(again.x, found.x)
    torch.testing.assert_close(again.y, found.y)


@pytest.mark.parametrize("rows", [1, 10, 100])
@pytest.mark.parametrize("case", ["1d", "2d grouped"])
def test_rows_stay_under_their_number_and_depend_on_the_seed_alone(case, rows):
    module, batches = conv_net(case)
    found, again, other = (
        surveyed(activations_of(module, batches, rows=lambda *_: rows, seed=seed, may_split=may_split))
        for seed, may_split in ((0, lambda _: True), (0, lambda name: name == "0"), (1, lambda _: True))
    )
    whole = dense_moments(module, "0", batches)
    assert 1 <= found["0"].rows <= max(rows, 3)  # one a batch at least
    assert_moments(
        again["0"],
        Moments(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(found["0"]).items()}),
    )
    if found["0"].rows < whole.rows:
        assert_other_moments(other["0"], found["0"])


@pytest.mark.parametrize(("calls", "count"), [(1, 8), (8, 1), (2, 4)])
def test_other_rows_are_taken_of_every_batch_and_call(calls, count):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return [self.fc(x) for _ in range(calls)]

    x = torch.randn(1, 50, 6)
    found = surveyed(activations_of(Again().eval(), lambda: iter([(x,)] * count), rows=lambda *_: 8))["fc"]
    assert found.rows == 8
    assert torch.linalg.matrix_rank(found.xx[0], rtol=1e-6) == 6  # one row four times would leave 3 at most


def test_rows_of_a_part_are_an_honest_part():
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    data = [(torch.randn(8, 3, 16, 16),) for _ in range(4)]
    found = surveyed(TorchActivations(module, lambda: iter(data), rows=lambda *_: 4000))["0"]
    whole = dense_moments(module, "0", lambda: iter(data))
    assert found.rows == 4 * 8 * 125
    assert (found.xx[0] - whole.xx[0]).norm() < 0.2 * whole.xx[0].norm()
    assert (2 * found.xx[0] - whole.xx[0]).norm() > 0.8 * whole.xx[0].norm()


def test_a_weight_used_twice_is_surveyed_in_both_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(input=torch.relu(self.a(x)))

    module, batches = Twice().eval(), batches_of(4, 6)
    x = torch.cat([x for path in "ab" for x, _ in inputs_of(module, path, batches)])[None]
    activations = activations_of(module, batches)
    expected = expected_moments(x, x @ module.a.weight.detach().T)
    assert_moments(surveyed(activations)["a"], expected)
    assert_moments(sequenced(activations)["a"], expected)
    assert_other_moments(surveyed(activations)["a"], dense_moments(module, "a", batches))
    assert [site.name for site in activations.sites] == ["a"]
    assert activations.sites[0].macs == 2 * 36


# -- sites


def test_sites_stand_in_execution_order_with_what_they_cost():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(8, 5)
            self.conv = nn.Conv2d(4, 8, 3, stride=(2, 1), groups=2)
            self.idle = nn.Linear(3, 3)
            self.up = nn.ConvTranspose2d(2, 4, 1)

        def forward(self, x):
            return self.last(self.conv(self.up(x)).mean((-2, -1)))

    activations: ModelActivations = activations_of(Backwards().eval(), batches_of(2, 2, 7, 6))
    conv, last = activations.sites
    assert (conv.name, conv.kind, conv.groups, conv.out_features, conv.in_features) == ("conv", "Conv2d", 2, 4, 18)
    assert (conv.kernel, conv.strides) == ((3, 3), (2, 1))
    assert conv.forms == ("channel", "input", "separable", "pivoted")
    assert conv.macs == 3 * 4 * 8 * 18
    assert (last.name, last.macs, last.forms, last.item_bytes) == ("last", 40, ("matmul", "pivoted"), 4)
    assert activations.unreachable == {
        "up": "ConvTranspose is not split",
        "idle": "never executed on the calibration data",
    }
    assert conv.load().shape == (2, 4, 18)


def test_excluded_sites_are_ignored():
    module = mlp()
    module[2].weight.data[0, 0] = math.nan
    activations = activations_of(module, batches_of(4, 6), may_split=lambda name: name == "0")
    assert [site.name for site in activations.sites] == ["0"]
    assert list(surveyed(activations)) == list(sequenced(activations)) == ["0"]


def test_sites_that_read_one_tensor_share_a_stage():
    inputs = {"q": 0, "k": 0, "v": 0, "out": 1, "up": 2, "gate": 2, "down": 3}
    assert staged(inputs, 100) == [["q", "k", "v"], ["out"], ["up", "gate"], ["down"]]
    assert staged(inputs, 1) == [list(inputs)]
    for stages in (1, 2, 3, 4, 5):
        assert len(staged(inputs, stages)) == min(stages, 4)
        assert [name for stage in staged(inputs, stages) for name in stage] == list(inputs)
    assert staged({}, 3) == []


# -- sequence


@pytest.mark.parametrize("stages", [1, 2, 16])
@pytest.mark.parametrize("case", ["1d", "2d grouped", "2d strided", "3d"])
def test_a_sequence_of_dense_sites_is_the_survey(case, stages):
    module, batches = conv_net(case)
    activations = activations_of(module, batches, stages=stages)
    found = sequenced(activations)
    assert list(found) == ["0", "2"]
    for name, moments in found.items():
        assert_moments(moments, dense_moments(module, name, batches))


def assert_feels(activations, module, batches, replaced, later, replacement):
    """The input of the `later` site is that of the compressed module, and its response that of the dense one."""
    found = sequenced(activations, lambda site, _: replacement if site.name == replaced else None)
    layer, other = module.get_submodule(later), really(module, {replaced: replacement})
    x = torch.cat([rows_of(layer, x) for x, _ in inputs_of(module, later, batches)], dim=1)
    now = torch.cat([rows_of(layer, x) for x, _ in inputs_of(other, later, batches)], dim=1)
    assert_moments(found[later], expected_moments(now, x @ weight_of(layer).mT))
    assert_other_moments(found[later], expected_moments(x, x @ weight_of(layer).mT))
    assert_other_moments(found[later], expected_moments(now, now @ weight_of(layer).mT))


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case, (conv, _) in CONVS.items() for form in (*forms.conv_forms(conv.kernel_size), "pivoted")],
)
def test_a_replaced_conv_changes_the_input_of_the_next_as_in_a_compressed_module(case, form):
    module, batches = conv_net(case)
    activations = activations_of(module, batches)
    assert_feels(activations, module, batches, "0", "2", replacement_of(module, "0", form=form))


def test_a_replaced_linear_changes_the_input_of_the_next_but_not_in_its_own_stage():
    module, batches = mlp(), batches_of(2, 3, 6)
    replacement = replacement_of(module, "0")
    assert_feels(activations_of(module, batches), module, batches, "0", "2", replacement)
    found = sequenced(
        activations_of(module, batches, stages=1), lambda site, _: replacement if site.name == "0" else None
    )
    assert_moments(found["2"], dense_moments(module, "2", batches))


def test_rows_of_both_networks_are_at_the_same_positions():
    """A part of the rows: with the first layer replaced by itself at full rank, x and y still belong together."""
    module, batches = mlp(), batches_of(2, 30, 6)
    full = replacement_of(module, "0", rank=6, bias=0.0)
    found = sequenced(
        activations_of(module, batches, rows=lambda *_: 60), lambda site, _: full if site.name == "0" else None
    )["2"]
    assert found.rows == 60
    torch.testing.assert_close(found.yx, weight_of(module[2]).double() @ found.xx, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.yx, 1.1 * weight_of(module[2]).double() @ found.xx, rtol=1e-3, atol=1e-4)


def test_a_replacement_that_does_not_fit_is_refused():
    module, batches = conv_net("2d grouped")
    good = replacement_of(module, "0")
    activations = activations_of(module, batches)
    for wrong in (
        good._replace(form="matmul"),
        good._replace(form="input"),
        good._replace(left=good.left[:1]),
        good._replace(right=good.right.mT),
        good._replace(bias=good.bias.reshape(-1)),
    ):
        with pytest.raises(ValueError, match="site '0'"):
            activations.distance({"0": wrong})
    with pytest.raises(ValueError, match="no such site"):
        activations.distance({"nonsense": good})
    assert activations.distance({"0": good}).relative > 0


# -- padding


def padded_tokens(width=6, left=False):
    def batch(length, ends):
        mask = torch.zeros(len(ends), length, dtype=torch.int64)
        for row, end in enumerate(ends):
            mask[row, :end] = 1
        return torch.randn(len(ends), length, width), mask.flip(1) if left else mask

    data = [batch(5, (5, 2, 3)), batch(4, (1, 4, 4))]
    return lambda: iter(data)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bool])
def test_padding_gives_no_rows(left, kind):
    module, batches = Tokens().eval(), padded_tokens(left=left)
    data = [(x, mask.to(kind)) for x, mask in batches()]
    activations = activations_of(module, lambda: iter(data), mask=1 if left else None)
    kept = [(x[mask == 1],) for x, mask in batches()]
    for found in (surveyed(activations), sequenced(activations)):
        for name, moments in found.items():
            assert_moments(moments, dense_moments(module, name, lambda: iter(kept)))
            assert_other_moments(moments, dense_moments(module, name, batches))
    part = surveyed(activations_of(module, lambda: iter(data), mask=1, rows=lambda *_: 6))["up"]
    assert part.rows == 6
    for wrong in ({"mask": 0}, {"mask": 7}, {"mask": None} if left else {"mask": 0}):
        assert surveyed(activations_of(module, lambda: iter(data), **wrong))["up"].rows == 27


def test_arguments_that_are_masks():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids, segments = torch.tensor([[1, 5, 0], [1, 7, 9]]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert find_mask((ids, segments, mask)) == 2
    assert find_mask((mask.bool(), mask)) == 0
    for none in ((), (ids,), (segments,), (mask.float(),), (mask[0],), (mask[None],), (None, 3), (mask[:0],)):
        assert find_mask(none) is None


def test_padding_is_left_out_of_the_distance():
    module, batches = Tokens().eval(), padded_tokens()
    replacements = {"up": replacement_of(module, "up")}
    other = really(module, replacements)
    with torch.no_grad():
        z, w = (torch.cat([m(x)[mask == 1] for x, mask in batches()]) for m in (module, other))
    expected = float((z - w).square().sum() / (z - z.mean(0)).square().sum())
    found = activations_of(module, batches).distance(replacements)
    assert found == (pytest.approx(expected, rel=1e-4), None)
    assert activations_of(module, batches, mask=0).distance(replacements).relative != pytest.approx(expected, rel=1e-4)


# -- compensation


class Joined(nn.Module):
    """A branch and a stream that meet in `join(stream, branch)`; `tap` shows the stream."""

    def __init__(self, join, kind="linear"):
        super().__init__()
        self.join = join
        self.tap, self.drop = nn.Identity(), nn.Dropout(0.5)
        if kind == "linear":
            self.first, self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        else:
            size = {"kernel_size": 3, "padding": 1} if kind == "conv" else {"kernel_size": 1}
            self.first, self.branch = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, groups=2, **size)
            self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        h = self.read = torch.relu(self.first(x))
        stream = self.tap(h * 0.9)
        return self.head(self.join(self, stream, self.branch(h)))


def in_place(stream, branch):
    branch += stream
    return branch * branch + branch


def into_stream(stream, branch):
    stream += branch
    return stream


def changed_later(stream, branch):
    total = stream + branch
    return total + branch.relu_()


def input_changed(net, stream, branch):
    """The input of the branch changes before its output is added."""
    net.read.mul_(3)
    return stream + branch


COMPENSATED = {
    "input changed": input_changed,
    "stream + branch": lambda net, s, b: s + b,
    "branch + stream": lambda net, s, b: b + s,
    "branch += stream": lambda net, s, b: in_place(s, b),
    "stream += branch": lambda net, s, b: into_stream(s, b),
    "add_": lambda net, s, b: b.add_(s),
    "torch.add": lambda net, s, b: torch.add(s, b),
    "keywords": lambda net, s, b: torch.add(input=b, other=s),
    "dropout": lambda net, s, b: net.drop(b) + s,
    "identity": lambda net, s, b: s + nn.Identity()(b).contiguous(),
    "size asked": lambda net, s, b: s + b if b.size(0) and b.shape[1] and b.dtype else b,
    "and then more": lambda net, s, b: torch.relu(s + b) + s,
}
PLAIN = {
    "alone": lambda net, s, b: b,
    "two adds": lambda net, s, b: (s + b) * (2 * s + b),
    "add and another use": lambda net, s, b: s + b + torch.relu(b),
    "another use and add": lambda net, s, b: torch.relu(b) + (s + b),
    "scaled": lambda net, s, b: s + 0.5 * b,
    "alpha": lambda net, s, b: torch.add(s, b, alpha=2),
    "subtracted": lambda net, s, b: s - b,
    "broadcast": lambda net, s, b: s[:1] + b,
    "a number": lambda net, s, b: b + 1,
    "itself": lambda net, s, b: b + b,
    "its own function": lambda net, s, b: torch.relu(b) + b,
    "in place first": lambda net, s, b: b.relu_() + s,
    "function in place": lambda net, s, b: F.relu(b, inplace=True) + s,
    "overwritten": lambda net, s, b: (b.__setitem__(0, 0.0), b + s)[1],
    "changed later": lambda net, s, b: changed_later(s, b),
    "in a list": lambda net, s, b: torch.stack([s, b]).sum(0),
}


def branch_targets(module, batches, replacement, compensate):
    """The moments at the branch, and the expected ones with and without the loss of the stream."""
    found = sequenced(
        activations_of(module, batches, compensate=compensate),
        lambda site, _: replacement if site.name == "first" else None,
    )["branch"]
    other, layer = really(module, {"first": replacement}), module.branch
    x, now = (
        torch.cat([rows_of(layer, x) for x, _ in inputs_of(net, "branch", batches)], 1) for net in (module, other)
    )
    stream, left = (
        torch.cat([outputs_of(layer, y) for _, y in inputs_of(net, "tap", batches)], 1) for net in (module, other)
    )
    y = x @ weight_of(layer).mT
    return found, expected_moments(now, y + stream - left), expected_moments(now, y)


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise"])
@pytest.mark.parametrize("join", COMPENSATED)
def test_a_branch_compensates_for_the_loss_of_its_stream(join, kind):
    module = Joined(COMPENSATED[join], kind).eval()
    batches = batches_of(3, 5, 6) if kind == "linear" else batches_of(2, 6, 5, 4)
    replacement = replacement_of(module, "first")
    found, compensated, plain = branch_targets(module, batches, replacement, True)
    assert_moments(found, compensated)
    assert_other_moments(found, plain)
    found, compensated, plain = branch_targets(module, batches, replacement, False)
    assert_moments(found, plain)
    assert_other_moments(found, compensated)


@pytest.mark.parametrize("join", PLAIN)
def test_a_branch_with_other_uses_does_not_compensate(join):
    module, batches = Joined(PLAIN[join]).eval(), batches_of(3, 5, 6)
    found, compensated, plain = branch_targets(module, batches, replacement_of(module, "first"), True)
    assert_moments(found, plain)
    assert_other_moments(found, compensated)


def test_of_two_added_sites_the_later_one_compensates():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.early, self.late = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.early(x) + self.late(torch.tanh(x))

    module, batches = Two().eval(), batches_of(4, 6)
    replacements = {name: replacement_of(module, name) for name in ("first", "early")}
    found = sequenced(activations_of(module, batches), lambda site, _: replacements.get(site.name))
    nets = module, really(module, {"first": replacements["first"]}), really(module, replacements)
    early, late = ([torch.cat([x for x, _ in inputs_of(n, p, batches)])[None] for n in nets] for p in ("early", "late"))
    outputs = [torch.cat([y for _, y in inputs_of(n, "early", batches)])[None] for n in nets]
    y = early[0] @ module.early.weight.detach().T
    assert_moments(found["early"], expected_moments(early[1], y))
    y = late[0] @ module.late.weight.detach().T
    assert_moments(found["late"], expected_moments(late[2], y + outputs[0] - outputs[2]))
    assert_other_moments(found["late"], expected_moments(late[2], y + outputs[0] - outputs[1]))
    assert_other_moments(found["late"], expected_moments(late[2], y))


def test_a_batch_without_the_addition():
    module = Joined(lambda net, s, b: s + b if len(s) > 2 else s * b).eval()
    data = [(torch.randn(n, 6),) for n in (4, 2, 3)]
    replacement = replacement_of(module, "first")
    found = sequenced(
        activations_of(module, lambda: iter(data)), lambda site, _: replacement if site.name == "first" else None
    )
    other = really(module, {"first": replacement})
    (x, now), (stream, left) = (
        [torch.cat([of(pair) for pair in inputs_of(net, path, lambda: iter(data))]) for net in (module, other)]
        for path, of in (("branch", lambda pair: pair[0]), ("tap", lambda pair: pair[1]))
    )
    lost = stream - left
    lost[4:6] = 0
    y = x @ module.branch.weight.detach().T
    assert_moments(found["branch"], expected_moments(now[None], (y + lost)[None]))
    assert_other_moments(found["branch"], expected_moments(now[None], (y + stream - left)[None]))


def test_rows_that_do_not_correspond_are_left_out():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            return self.expert(x[x[:, 0] > 0] if len(x) > 2 else x)

    module = Routed().eval()
    data = [(torch.randn(n, 6),) for n in (20, 2)]
    bias = replacement_of(module, "first", rank=6, bias=9.0)  # now all of them are above zero
    found = sequenced(
        activations_of(module, lambda: iter(data)), lambda site, _: bias if site.name == "first" else None
    )
    assert found["first"].rows == 22
    assert found["expert"].rows == 2


def test_a_tensor_changed_in_place_is_another_one():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = torch.relu(x)
            h += self.early(h)
            return self.late(h)

    module, batches = Grows().eval(), batches_of(4, 6)
    replacement = replacement_of(module, "early")
    assert_feels(activations_of(module, batches), module, batches, "early", "late", replacement)


# -- attention


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nets.seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def test_hooks_see_the_layers_of_attentions():
    module, batches = encoder(), batches_of(2, 5, 8)
    activations = activations_of(module, batches)
    within = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    names = [f"layers.{i}.{name}" for i in (0, 1) for name in within]
    assert [site.name for site in activations.sites] == names
    assert activations.unreachable == {}
    found = surveyed(activations)
    read = torch.cat([x.reshape(1, -1, 8) for (x,) in batches()], 1)
    weight = module.layers[0].self_attn.in_proj_weight.detach()
    assert_moments(found[names[0]], expected_moments(read, read @ weight.T))
    replacements = {name: replacement_of(module, name, rank=2) for name in names[:2]}
    other = really(module, replacements)
    felt = sequenced(activations, lambda site, _: replacements.get(site.name))
    now = torch.cat([x for x, _ in inputs_of(other, "layers.0.linear1", batches)], 1).reshape(1, -1, 8)
    torch.testing.assert_close(felt[names[2]].mean_x, now.double().mean(1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        z, w = (torch.cat([net(x) for (x,) in batches()]) for net in (module, other))
    expected = float((z - w).square().sum() / (z - z.mean(0)).square().sum())
    assert activations.distance(replacements).relative == pytest.approx(expected, rel=1e-3)
    assert activations.distance({}).relative < 1e-9


def test_an_attention_over_something_else_has_no_packed_product():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, 2 * x, x, need_weights=False)[0]

    activations = activations_of(Cross().eval(), batches_of(2, 5, 8))
    assert [site.name for site in activations.sites] == ["attention.out_proj"]
    assert "not one tensor" in activations.unreachable["attention.in_proj_weight"]


# -- distance


def test_the_distance_is_that_of_the_really_compressed_module():
    module, batches = mlp(), batches_of(50, 6, count=5)
    activations, seen = activations_of(module, batches), []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert activations.distance({}) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    handle.remove()
    every = torch.cat([x for (x,) in batches()])
    x = seen[0]
    assert [len(part) for part in seen] == [distance_samples(len(every))] * 2, "from all batches, together"
    numbers = [int((every == row).all(dim=1).nonzero()) for row in x]
    assert len({number // 50 for number in numbers}) >= 4
    for names in ("0", "02", "024"):
        replacements = {name: replacement_of(module, name) for name in names}
        with torch.no_grad():
            z, w = module(x), really(module, replacements)(x)
        expected = float((z - w).square().sum() / (z - z.mean(0)).square().sum())
        kl = float(F.kl_div(w.log_softmax(1), z.log_softmax(1), log_target=True, reduction="batchmean"))
        assert activations.distance(replacements) == (pytest.approx(expected, rel=1e-4), pytest.approx(kl, rel=1e-3))
        assert activations.distance(replacements).relative != pytest.approx(1.1 * expected, rel=1e-4)


class Unit(nn.Module):
    """Gives integers, then embeddings of unit norm."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return {"ids": torch.ones(len(x), dtype=torch.int64), "z": [F.normalize(self.fc(x), dim=-1)]}


@pytest.mark.parametrize(
    ("make", "scores"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4)), True),
        (lambda: nn.Sequential(nn.Linear(6, 1)), False),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), False),
        (Unit, False),
    ],
)
def test_class_scores_alone_have_a_kl(make, scores):
    module = make().eval()
    activations = activations_of(module, batches_of(9, 6))
    name = activations.sites[0].name
    found = activations.distance({name: replacement_of(module, name)})
    assert (found.kl is not None) == scores
    assert found.relative > 1e-6


def test_samples_of_many_small_batches_are_run_together():
    module, data = mlp(), [(torch.randn(4, 6),) for _ in range(300)]
    activations, seen = activations_of(module, lambda: iter(data), may_split=lambda name: name == "0"), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    activations.distance({})
    found = torch.cat(seen[: len(seen) // 2])
    assert torch.equal(found, torch.cat([x[:1] for (x,) in data[::4]])[:75])
    assert [len(x) for x in seen] == [*[4] * 18, 3] * 2


def test_batches_that_cannot_be_taken_apart_are_run_whole():
    module = Tokens().eval()
    data = [(torch.randn(5, 7, 6), torch.ones(3), "text") for _ in range(100)]
    activations, seen = activations_of(module, lambda: iter(data)), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    activations.distance({})
    assert len(seen) == 2 * math.ceil(32 / 5)
    # one of three
    assert all(found is given[0] for (found, *_), given in zip(seen[:7], data[:21:3], strict=True))


def test_outputs_of_several_lengths_and_none_at_all():
    module = nn.Sequential(nn.Linear(6, 4)).eval()
    data = [(torch.randn(2, length, 6),) for length in (3, 5)]
    replacements = {"0": replacement_of(module, "0")}
    with torch.no_grad():
        z, w = (torch.cat([net(x).reshape(-1, 4) for (x,) in data]) for net in (module, really(module, replacements)))
    expected = float((z - w).square().sum() / (z - z.mean(0)).square().sum())
    assert activations_of(module, lambda: iter(data)).distance(replacements) == (
        pytest.approx(expected, rel=1e-4),
        None,
    )
    nothing = nn.Sequential(nn.Linear(6, 4), nets.Pick()).eval()
    nothing[1].forward = lambda x: x.argmax(-1)
    with pytest.raises(ModelError, match="no floating output"):
        activations_of(nothing, batches_of(2, 6)).distance({})


def test_a_replacement_that_explodes_is_infinitely_far():
    module = mlp()
    good = replacement_of(module, "0")
    found = activations_of(module, batches_of(9, 6)).distance({"0": good._replace(bias=good.bias * math.inf)})
    assert found == (math.inf, math.inf)


# -- unchanged modules and errors


def snapshot(module):
    """The parts of a module that hooks and replaced forwards could change."""
    return {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks), sorted(m.__dict__), m.training)
        for name, m in module.named_modules()
    }


@pytest.mark.parametrize("explode", [False, True])
@pytest.mark.parametrize("make", [mlp, encoder])
def test_the_module_is_unchanged_afterwards(make, explode):
    torch.backends.mha.set_fastpath_enabled(True)
    module = make()
    batches = batches_of(4, 6) if make is mlp else batches_of(2, 5, 8)
    kept, state = snapshot(module), {k: v.clone() for k, v in module.state_dict().items()}
    x = next(batches())[0]
    dense = module(x)
    activations = activations_of(module, batches)

    def visit(site, _):
        if explode and site is activations.sites[-1]:
            raise KeyError("visit")
        return replacement_of(module, site.name)

    if explode:
        with pytest.raises(KeyError):
            activations.sequence(visit)
    else:
        activations.sequence(visit)
    activations.distance({site.name: replacement_of(module, site.name) for site in activations.sites})
    assert snapshot(module) == kept
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(module(x), dense)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_of_the_layers_own_comes_back():
    module = mlp()
    inner = module[0].forward
    module[0].forward = lambda x: inner(x) + 1
    own = module[0].forward
    activations = activations_of(module, batches_of(4, 6))
    sequenced(activations, lambda site, _: replacement_of(module, site.name))
    assert module[0].forward is own


def test_values_that_are_not_finite_name_their_site():
    module = mlp()
    module[0].bias.data[0] = math.inf
    module[2].weight.data[:, 0] = 0
    for act in (surveyed, sequenced):
        with pytest.raises(ModelError, match=r"site '2'.*--exclude '2'"):
            act(activations_of(module, batches_of(4, 6)))
    module = mlp()
    module[2].weight.data[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"site '2': its weight.*--exclude '2'"):
        surveyed(activations_of(module, batches_of(4, 6), memory=1))
    with pytest.raises(ModelError, match="its output on the calibration data"):
        activations_of(module, batches_of(4, 6)).distance({})


def test_data_that_do_not_fit_have_different_errors():
    module = mlp()
    with pytest.raises(UsageError, match=r"Sequential cannot be run.*torch.float32 \(4, 5\).*positional"):
        activations_of(module, batches_of(4, 5))
    with pytest.raises(UsageError, match="no calibration data"):
        activations_of(module, lambda: iter([]))
    with pytest.raises(UsageError, match="a tuple of positional arguments, but got Tensor"):
        activations_of(module, lambda: iter([torch.randn(4, 6)]))
    with pytest.raises(UsageError, match="stages"):
        activations_of(module, batches_of(4, 6), stages=0)
    with pytest.raises(UsageError, match=r"module.eval\(\)"):
        activations_of(mlp().train(), batches_of(4, 6))


def test_sites_that_later_batches_do_not_reach_or_reach_otherwise():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rare, self.many = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.always(x)
            y = y + self.rare(y[y.sum(-1) > 1e9])[:0].sum()
            for _ in range(len(x)):
                y = self.many(y)
            return y

    data = [(torch.randn(n, 6),) for n in (2, 1, 3)]
    activations = activations_of(Sometimes().eval(), lambda: iter(data))
    found = surveyed(activations)
    assert list(found) == ["always", "many"]
    assert (found["always"].rows, found["many"].rows) == (6, 2 * 2 + 1 + 2 * 3)  # as many calls as in the first batch
    assert activations.unreachable == {"rare": "never executed on the calibration data"}
    assert [site.name for site in activations.sites] == ["always", "many"]
    assert list(sequenced(activations)) == ["always", "many"]


def test_half_precision_modules_are_read_in_single():
    module, batches = mlp().bfloat16(), batches_of(20, 6)
    data = [(x.bfloat16(),) for (x,) in batches()]
    activations = activations_of(module, lambda: iter(data))
    found = sequenced(activations)
    x = torch.cat([x.float() for (x,) in data])[None]
    assert_moments(found["0"], expected_moments(x, x @ module[0].weight.detach().float().T))
    assert activations.sites[0].item_bytes == 2
    good = replacement_of(copy.deepcopy(module).float(), "0", rank=6, bias=0.0)
    assert activations.distance({"0": good}).relative < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_moments_are_the_same():
    module, batches = conv_net("2d grouped")
    expected = surveyed(activations_of(module, batches))
    activations = activations_of(copy.deepcopy(module).cuda(), batches)
    for found in (surveyed(activations), sequenced(activations)):
        for name, moments in found.items():
            assert moments.xx.is_cuda
            cpu = Moments(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(moments).items()})
            assert_moments(cpu, expected[name])
