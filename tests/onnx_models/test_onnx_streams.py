"""`OnnxStreams` against brute force: every value of really compressed models, every patch unfolded."""

import math
import tempfile

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from rsi_deploy.calibration import accumulator as gathered
from rsi_deploy.calibration import live_values, moments
from rsi_deploy.calibration.activations import ModelActivations, Replacement, distance_samples, output_distance
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.core.errors import ModelError
from rsi_deploy.linalg.solver import exact_svd
from rsi_deploy.onnx_models.calibration import dense_pass as onnx_survey
from rsi_deploy.onnx_models.calibration import row_sampling as onnx_readings
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.calibration.dense_pass import Survey
from rsi_deploy.onnx_models.calibration.reachable_sites import added_to
from rsi_deploy.onnx_models.calibration.row_sampling import padding_mask
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import cut
from tests import flows

CNN = """agraph (float[n, 3, 8, 8] x) => (float[n, 5] y)
<float[8, 3, 3, 3] c1, float[8] c1_bias, float[8, 8, 3, 3] c2, float[8, 3, 1, 1] down, float[8, 4, 3, 2] grouped,
 float[5, 8] fc, float[5] fc_bias> {
  h1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, c1, c1_bias)
  r1 = Relu(h1)
  h2 = Conv <pads = [1, 1, 1, 1]> (r1, c2)
  d = Conv <strides = [2, 2]> (x, down)
  s = Add(h2, d)
  r2 = Relu(s)
  g = Conv <group = 2, auto_pad = "SAME_UPPER", strides = [2, 1]> (r2, grouped)
  m = GlobalAveragePool(g)
  f = Flatten(m)
  y = Gemm <transB = 1> (f, fc, fc_bias)
}"""

BLOCK = """agraph (float[n, l, 6] x, int64[n, l] attention_mask) => (float[n, l, 6] y)
<float[6, 6] wq, float[6, 6] wk, float[6, 6] wv, float[6, 6] wo, float[6] wo_bias,
 float[6, 12] up, float[12] up_bias, float[12, 6] out, float[6] out_bias, float[6, 6] last> {
  first = Constant <value_ints = [0]> ()
  mean = ReduceMean <keepdims = 1> (x, first)
  e = MatMul(x, last)
  z = Add(e, mean)
  q = MatMul(z, wq)
  k = MatMul(z, wk)
  kt = Transpose <perm = [0, 2, 1]> (k)
  v = MatMul(z, wv)
  s = MatMul(q, kt)
  p = Softmax(s)
  o = MatMul(p, v)
  w = MatMul(o, wo)
  wb = Add(wo_bias, w)
  z1 = Add(z, wb)
  u = MatMul(z1, up)
  ub = Add(u, up_bias)
  g = Relu(ub)
  t = MatMul(g, out)
  tb = Add(t, out_bias)
  y = Add(tb, z1)
}"""

PACKED = """agraph (float[n, l, 8] x) => (float[n, l, 8] y)
<float[8, 8] first, float[8, 24] qkv, float[24] qkv_bias, float[8, 8] wo, float[8, 12] up, float[12, 8] down> {
  e = MatMul(x, first)
  a = com.microsoft.Attention <num_heads = 2> (e, qkv, qkv_bias)
  s = Add(a, e)
  w = MatMul(s, wo)
  z = Add(e, w)
  u = MatMul(z, up)
  r = Relu(u)
  t = MatMul(r, down)
  y = Add(t, z)
}"""

SEVERAL = """agraph (int64[n, l] ids, float[n, 5] features, float bonus) => (float[n, 4] y, int64[n] best)
<float[11, 6] table, float[6, 6] a, float[5, 6] b, float[6, 4] c> {
  e = Gather(table, ids)
  h = MatMul(e, a)
  axes = Constant <value_ints = [1]> ()
  m = ReduceMean <keepdims = 0> (h, axes)
  f = MatMul(features, b)
  s = Add(m, f)
  r = Relu(s)
  z = MatMul(r, c)
  y = Add(z, bonus)
  best = ArgMax <axis = 1, keepdims = 0> (y)
}"""

FIXED = """agraph (float[4, 6] x) => (float[4, 3] y) <float[6, 8] a, float[8, 8] b, float[8, 3] c> {
  h = MatMul(x, a)
  r = Relu(h)
  k = MatMul(r, b)
  shape = Constant <value_ints = [4, 8]> ()
  fixed = Reshape(k, shape)
  y = MatMul(fixed, c)
}"""

LINE = """agraph (float[n, 4, 16] x) => (float[n, 3, 16] y) <float[6, 4, 3] a, float[3, 6, 5] b> {
  h = Conv <dilations = [2], pads = [2, 2]> (x, a)
  r = Relu(h)
  y = Conv <auto_pad = "SAME_LOWER"> (r, b)
}"""

BROADCAST = """agraph (float[n, l, 6] x) => (float[n, l, 6] y) <float[6, 6] a, float[6, 6] b, float[6, 6] c> {
  axes = Constant <value_ints = [0, 1]> ()
  h = MatMul(x, a)
  m = ReduceMean <keepdims = 1> (h, axes)
  k = MatMul(h, b)
  s = Add(k, m)
  z = MatMul(s, c)
  y = Add(z, z)
}"""


def masks(rng, n, length):
    mask = np.ones((n, length), np.int64)
    for row, size in zip(mask, rng.integers(2, length + 1, n), strict=True):
        row[size:] = 0
    return mask


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# text, makes one batch
MODELS = {
    "cnn": (CNN, lambda rng: {"x": normal(rng, 5, 3, 8, 8)}),
    "block": (BLOCK, lambda rng: {"x": normal(rng, 4, 7, 6), "attention_mask": masks(rng, 4, 7)}),
    "packed": (PACKED, lambda rng: {"x": normal(rng, 4, 5, 8)}),
    "several": (
        SEVERAL,
        lambda rng: {
            "ids": rng.integers(0, 11, (6, 3)),
            "features": normal(rng, 6, 5),
            "bonus": np.array(0.5, np.float32),
        },
    ),
    "fixed batch": (FIXED, lambda rng: {"x": normal(rng, 4, 6)}),
    "broadcast": (BROADCAST, lambda rng: {"x": normal(rng, 3, 5, 6)}),
    "line": (LINE, lambda rng: {"x": normal(rng, 3, 4, 16)}),
}
each_model = pytest.mark.parametrize("case", MODELS)


class Setting:
    """A model in a folder, its batches and streams."""

    def __init__(self, folder, case, *, external=False, seed=0, batches=3):
        text, batch = MODELS[case]
        self.path = flows.saved(flows.text_model(text), folder / "dense.onnx", external=external)
        rng = np.random.default_rng(seed)
        self.batches = [batch(rng) for _ in range(batches)]
        self.samples = sum(len(next(iter(b.values()))) for b in self.batches)
        self.graph = flows.graph_sites(self.path)
        self.target = folder / "really.onnx"

    def streams(self, **options):
        return OnnxStreams(self.path, lambda: iter(self.batches), self.samples, **options)

    def replacement(self, name, rank=1, bias=0.2, form=None):
        site = self.graph[name]
        form = form or site.forms[-1]
        left, right = exact_svd(torch.from_numpy(site.load(form).astype(np.float32).copy()), rank)
        size = site.bias_size // site.groups
        return Replacement(form, left, right, bias * torch.arange(site.groups * size).reshape(site.groups, size) / size)

    def values(self, replacements=None):
        """Every value on every batch, of the model with these sites really split."""
        path = self.path
        if replacements:
            path = flows.really_split(self.path, self.target, replacements)
        return [flows.all_values(path, batch) for batch in self.batches]

    def expected(self, name, dense, other, *, beside=""):
        """Moments of a site by brute force, from all rows but the padding's."""
        site = self.graph[name]
        xs, ys = [], []
        weight = torch.from_numpy(site.load().astype(np.float32).copy())
        for batch, a, b in zip(self.batches, dense, other, strict=True):
            y = flows.input_rows(site, a[site.data]) @ weight.mT
            if beside:
                y = y + flows.output_rows(site, a[beside] - b[beside])
            x = flows.input_rows(site, b[site.data])
            mask = batch.get("attention_mask")
            kept = slice(None) if mask is None else torch.from_numpy(mask.reshape(-1) == 1)
            xs.append(x[:, kept])
            ys.append(y[:, kept])
        return flows.brute_moments(torch.cat(xs, dim=1), torch.cat(ys, dim=1))

    def waves(self):
        program = cut(onnx.load(self.path), [site.output for site in self.graph.values()])
        names = {site.output: name for name, site in self.graph.items()}
        return [[names[node.output[0]] for node in wave.sites] for wave in program.waves]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where models stand; live values go to a folder in it, nothing of which may be left."""
    live = tmp_path / "live"
    live.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(live))
    yield tmp_path
    assert list(live.iterdir()) == []
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def surveyed(streams):
    found = {}
    streams.survey(lambda site, given: found.update({site.name: given}))
    return found


def sequenced(streams, become=lambda site: None):
    found = {}

    def visit(site, given):
        found[site.name] = given
        return become(site)

    streams.sequence(visit)
    return found


# what each response is added to, where it has its shape
BESIDE = {
    "cnn": {"c2": "d", "down": "h2"},
    "block": {"wo": "z", "out": "z1"},
    "packed": {"wo": "e", "down": "z"},
    "several": {"b": "m"},
    "fixed batch": {},
    "broadcast": {},
    "line": {},
}


# -- survey


@each_model
@pytest.mark.parametrize("external", [False, True])
def test_a_survey_is_that_of_all_rows(folder, case, external):
    setting = Setting(folder, case, external=external)
    streams: ModelActivations = setting.streams()
    found = surveyed(streams)
    assert list(found) == [name for wave in setting.waves() for name in wave] == [s.name for s in streams.sites]
    dense = setting.values()
    for name, given in found.items():
        expected = setting.expected(name, dense, dense)
        flows.assert_moments(given, expected)
        assert streams.rows_of(name) == expected["rows"]
        with pytest.raises(AssertionError):
            flows.assert_moments(given, {**expected, "xx": 1.01 * expected["xx"]})
    assert streams.unreachable == {}


def test_what_a_site_is_told(folder):
    setting = Setting(folder, "cnn")
    sites = {site.name: site for site in setting.streams(macs={setting.graph["grouped"].node: 999}).sites}
    grouped = sites["grouped"]
    assert (grouped.kind, grouped.groups, grouped.out_features, grouped.in_features) == ("Conv", 2, 4, 24)
    assert (grouped.kernel, grouped.strides, grouped.macs) == ((3, 2), (2, 1), 999)
    assert grouped.load().shape == (2, 4, 24)
    assert grouped.forms == setting.graph["grouped"].forms
    assert sites["fc"].kernel == ()


def test_wide_sites_keep_their_rows(folder, monkeypatch):
    monkeypatch.setattr(moments.MomentAccumulator.__init__, "__kwdefaults__", {"limit": 8})
    for module in (gathered, onnx_readings, onnx_survey):
        monkeypatch.setattr(module, "GRAM_LIMIT", 8)
    setting = Setting(folder, "cnn")
    dense = setting.values()
    for found in (surveyed(setting.streams()), sequenced(setting.streams())):
        assert isinstance(found["c1"], Samples)
        assert isinstance(found["down"], Moments)
        x, y = found["c1"].x, found["c1"].y
        expected = setting.expected("c1", dense, dense)
        a, b = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        torch.testing.assert_close((a.mT @ a / x.shape[1]).double(), expected["xx"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((b.mT @ a / x.shape[1]).double(), expected["yx"], rtol=1e-3, atol=1e-4)


def test_large_inputs_run_in_parts(folder, monkeypatch):
    setting = Setting(folder, "cnn")
    whole = surveyed(setting.streams())
    batch = next(iter(setting.streams()._feeds()))
    size = sum(array.nbytes for array in batch.values())
    monkeypatch.setattr("rsi_deploy.onnx_models.calibration.activations.INPUT_BYTES", size // 2)
    streams = setting.streams()
    parts = list(streams._feeds())
    assert all(sum(array.nbytes for array in part.values()) <= size // 2 for part in parts)
    assert len(parts) > len(setting.batches)
    for name, found in surveyed(streams).items():  # every row is read, so the cuts change the folds alone
        torch.testing.assert_close(found.xx, whole[name].xx, rtol=1e-4, atol=1e-5)


def test_a_quota_of_rows_is_kept_and_chosen_by_the_seed(folder, monkeypatch):
    monkeypatch.setattr("rsi_deploy.onnx_models.calibration.row_sampling.row_limit", lambda *shape: 60)
    monkeypatch.setattr("rsi_deploy.onnx_models.calibration.row_sampling.ROWS", 20)
    setting = Setting(folder, "cnn")
    rows = {name: given.rows for name, given in surveyed(setting.streams()).items()}
    assert rows["c1"] == 60  # 4 positions each of 15 samples
    assert rows["fc"] == 15
    one, same, other = (surveyed(setting.streams(seed=seed))["c1"] for seed in (0, 0, 1))
    assert torch.equal(one.xx, same.xx)
    assert not torch.equal(one.xx, other.xx)
    block = Setting(folder, "block")
    rows = {name: given.rows for name, given in sequenced(block.streams()).items()}
    assert surveyed(block.streams())["wq"].rows < rows["wq"], "8 rows an input are enough to choose ranks by"
    quota = sum(min(20, int(batch["attention_mask"].sum())) for batch in block.batches)
    assert rows["wq"] == rows["out"] == quota <= 60


# -- sequence


@each_model
def test_with_nothing_replaced_both_streams_are_the_dense_one(folder, case):
    setting = Setting(folder, case)
    found = sequenced(setting.streams())
    dense = setting.values()
    for name, given in found.items():
        flows.assert_moments(given, setting.expected(name, dense, dense))


CHOICES = {"all": lambda number: True, "even": lambda number: number % 2 == 0, "odd": lambda number: number % 2 == 1}


@each_model
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("compensate", [True, False])
def test_a_site_sees_the_really_compressed_model(folder, case, choice, compensate):
    setting = Setting(folder, case)
    streams = setting.streams(compensate=compensate)
    order = [site.name for site in streams.sites]
    become = {n: setting.replacement(n) for i, n in enumerate(order) if CHOICES[choice](i)}
    found = sequenced(streams, lambda site: become.get(site.name))
    assert list(found) == order
    dense = setting.values()
    done, differed = {}, 0
    for wave in setting.waves():
        other = setting.values(done)
        for name in wave:
            beside = BESIDE[case].get(name, "") if compensate else ""
            later = beside and beside in {setting.graph[n].output for n in wave}
            unmade = {"h2"} if name == "down" else set()  # made after it
            beside = "" if later or beside in unmade else beside
            flows.assert_moments(found[name], setting.expected(name, dense, other, beside=beside), tolerance=1e-3)
            if done and any(
                not np.allclose(a[setting.graph[name].data], b[setting.graph[name].data])
                for a, b in zip(dense, other, strict=True)
            ):
                differed += 1
                with pytest.raises(AssertionError):
                    flows.assert_moments(found[name], setting.expected(name, dense, dense), tolerance=1e-3)
        done |= {name: become[name] for name in wave if name in become}
    assert differed or (case, choice) == ("line", "odd")  # where only the last one became another


def test_a_branch_is_asked_for_what_its_neighbour_lost(folder):
    setting = Setting(folder, "cnn")
    become = {"down": setting.replacement("down")}
    with_, without = (
        sequenced(setting.streams(compensate=compensate), lambda site: become.get(site.name))["c2"]
        for compensate in (True, False)
    )
    torch.testing.assert_close(with_.xx, without.xx)
    dense, other = setting.values(), setting.values(become)
    flows.assert_moments(with_, setting.expected("c2", dense, other, beside="d"), tolerance=1e-3)
    with pytest.raises(AssertionError):
        flows.assert_moments(without, setting.expected("c2", dense, other, beside="d"), tolerance=1e-3)


def test_live_values_on_disk_change_nothing(folder, monkeypatch):
    setting = Setting(folder, "block")

    def run():
        return sequenced(setting.streams(), lambda site: setting.replacement(site.name))

    memory = run()
    monkeypatch.setattr(live_values.LiveValues.__init__, "__defaults__", (0,))
    for name, given in run().items():
        torch.testing.assert_close(given.yx, memory[name].yx)


def test_sites_that_may_not_be_split_are_not_observed(folder):
    setting = Setting(folder, "block")
    streams = setting.streams(may_split=lambda name: name in ("wk", "out"))
    become = {name: setting.replacement(name) for name in ("wk", "out")}
    found = sequenced(streams, lambda site: become[site.name])
    assert list(found) == ["wk", "out"] == [site.name for site in streams.sites]
    dense, other = setting.values(), setting.values({"wk": become["wk"]})
    flows.assert_moments(found["out"], setting.expected("out", dense, other, beside="z1"), tolerance=1e-3)


# -- masks


def test_masks_are_found_by_name_and_values():
    good = np.array([[1, 1, 0], [1, 1, 1]])
    for mask in (good, good.astype(bool), good.astype(np.float32), good[:, ::-1]):
        np.testing.assert_array_equal(padding_mask({"attention_mask": mask}), mask == 1)
    for name, mask in {
        "key_padding_mask": 1 - good,
        "mask": good * -1e9,
        "input_ids": good,
        "mask_2": good[:, None],
        "mask_3": good + 1,
    }.items():
        assert padding_mask({name: mask}) is None


def test_padding_is_no_row_and_no_distance(folder):
    setting = Setting(folder, "block")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in setting.batches)
    found = surveyed(setting.streams())
    assert {given.rows for given in found.values()} == {tokens} != {3 * 4 * 7}
    become = {"out": setting.replacement("out")}
    kept = [
        np.concatenate([v["y"][b["attention_mask"] == 1] for v, b in zip(values, setting.batches, strict=True)])
        for values in (setting.values(), setting.values(become))
    ]
    expected = output_distance(*(torch.from_numpy(array)[:, None] for array in kept))
    found = setting.streams().distance(become)
    assert found.relative == pytest.approx(expected.relative, rel=1e-4)
    assert found.kl is None


# -- some of the sites


@each_model
def test_some_sites_alone_are_told_what_they_are_told_among_all(folder, case):
    setting = Setting(folder, case)
    names = [site.name for site in setting.streams().sites]
    for wanted in ({names[-1]}, {names[0], names[-1]}, set(names[::2]), set()):
        become = {name: setting.replacement(name) for name in wanted}
        streams = setting.streams()
        whole = sequenced(streams, lambda site, become=become: become.get(site.name))
        fewer = streams.only(wanted)
        found = sequenced(fewer, lambda site, become=become: become.get(site.name))
        assert list(found) == [name for name in whole if name in wanted] == [site.name for site in fewer.sites]
        for name, given in found.items():
            torch.testing.assert_close(given.xx, whole[name].xx)
            torch.testing.assert_close(given.yx, whole[name].yx)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(1.01 * given.xx, whole[name].xx)
        assert surveyed(fewer).keys() == wanted
        assert [site.name for site in streams.sites] == names, "the streams themselves stay as they are"


def test_a_branch_among_some_sites_makes_up_for_what_another_has_lost(folder):
    setting = Setting(folder, "cnn")  # `h2 + d`: c2 stands behind c1, beside down
    become = {"down": setting.replacement("down")}
    found = sequenced(setting.streams().only({"down", "c2"}), lambda site: become.get(site.name))
    alone = sequenced(OnnxStreams(setting.path, lambda: iter(setting.batches), setting.samples, compensate=False))
    expected = setting.expected("c2", setting.values(), setting.values(become), beside="d")
    flows.assert_moments(found["c2"], expected)
    assert not torch.allclose(alone["c2"].yx, found["c2"].yx, rtol=1e-2)


# -- distance


@each_model
def test_the_distance_is_that_of_the_really_compressed_model(folder, case):
    setting = Setting(folder, case, batches=2)
    streams = setting.streams()
    names = [site.name for site in streams.sites]
    for become in ({name: setting.replacement(name) for name in names}, {names[-1]: setting.replacement(names[-1])}):
        dense, other = setting.values(), setting.values(become)
        z, w = (np.concatenate([v["y"] for v in values]) for values in (dense, other))
        if "attention_mask" in setting.batches[0]:
            kept = np.concatenate([b["attention_mask"] for b in setting.batches]) == 1
            z, w = z[kept][:, None], w[kept][:, None]
        expected = output_distance(torch.from_numpy(z), torch.from_numpy(w))
        found = streams.distance(become)
        assert found.relative == pytest.approx(expected.relative, rel=1e-3)
        assert found.kl == (None if expected.kl is None else pytest.approx(expected.kl, rel=1e-3))
        assert found.relative != pytest.approx(2 * expected.relative, rel=1e-2)
    assert streams.distance({}).relative == 0


@each_model
def test_a_survey_measures_from_where_it_stands_what_the_whole_model_tells(folder, case, monkeypatch):
    setting = Setting(folder, case)
    streams, whole, used = setting.streams(), setting.streams(), []
    outputs = Survey.outputs
    monkeypatch.setattr(Survey, "outputs", lambda self, r, *rest: used.append(r.site.name) or outputs(self, r, *rest))

    def visit(site, given):
        for bias in (0.2, 0.1):
            become = {site.name: setting.replacement(site.name, bias=bias)}
            found, expected = streams.distance(become), whole.distance(become)
            assert found.relative == pytest.approx(expected.relative, rel=1e-3)
            assert found.kl == (None if expected.kl is None else pytest.approx(expected.kl, rel=1e-3))
            assert found.relative != pytest.approx(1.1 * expected.relative, rel=1e-2)

    streams.survey(visit)
    names = [site.name for site in streams.sites]
    assert used == [name for name in names for _ in range(2)]
    both = {name: setting.replacement(name) for name in (names[0], names[-1])}
    assert streams.distance(both) == whole.distance(both), "several sites, and none that a survey stands at"
    assert len(used) == 2 * len(names)


PRODUCTS = {
    "square": ("float[n, 6] x) => (float[n, 6] y) <float[6, 6] a, float[6, 6] b>", "Gemm(r, b)"),
    "turned": ("float[n, 6] x) => (float[n, 6] y) <float[6, 6] a, float[6, 6] b>", "Gemm <transB = 1> (r, b)"),
    "half": ("float16[n, 6] x) => (float16[n, 5] y) <float16[6, 6] a, float16[6, 5] b>", "MatMul(r, b)"),
    "constant": ("float[n, 6] x) => (float[n, 5] y) <float[6, 6] a, float[5, 6] c>", "MatMul(r, b)"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_one_session_serves_all_that_is_tried_at_a_site(folder, monkeypatch, case):
    head, last = PRODUCTS[case]
    turned = "b = Transpose(c)" if case == "constant" else ""
    text = f"agraph ({head} {{\n h = MatMul(x, a)\n r = Relu(h)\n {turned}\n y = {last}\n}}"
    dtype = np.float16 if case == "half" else np.float32
    monkeypatch.setitem(MODELS, "product", (text, lambda rng: {"x": rng.standard_normal((8, 6)).astype(dtype)}))
    setting = Setting(folder, "product")
    streams, whole = setting.streams(), setting.streams()
    sessions = []
    started = Segment._started
    monkeypatch.setattr(Segment, "_started", lambda self, feeds: sessions.append(self) or started(self, feeds))
    before = {}

    def visit(site, given):
        for rank in (1, 2, 3):
            become = {site.name: setting.replacement(site.name, rank=rank)}
            sessions.clear()
            found = streams.distance(become).relative
            before[site.name] = [*before.get(site.name, []), len(sessions)]
            expected = whole.distance(become).relative
            assert found == pytest.approx(expected, rel=2e-2 if case == "half" else 1e-3)
            assert found != pytest.approx(1.1 * expected, rel=2e-2)

    streams.survey(visit)
    assert len(before) == 2
    for name, counts in before.items():
        assert counts[1:] == ([1, 1] if (case, name) == ("constant", "c") else [0, 0])


@each_model
def test_exact_replacements_are_at_no_distance(folder, case):
    setting = Setting(folder, case)
    streams = setting.streams()
    for site in streams.sites:
        for form in site.forms:
            full = setting.replacement(site.name, rank=min(site.shape(form)), bias=0, form=form)
            assert streams.distance({site.name: full}).relative < 1e-9
    assert streams.distance({site.name: setting.replacement(site.name, rank=1)}).relative > 1e-6


@each_model
def test_the_data_run_once_where_all_moments_fit_into_memory(folder, case, monkeypatch):
    setting = Setting(folder, case)
    sessions, started = [], Segment._started
    monkeypatch.setattr(Segment, "_started", lambda self, feeds: sessions.append(self) or started(self, feeds))
    runs, run = [], Segment.__call__
    monkeypatch.setattr(Segment, "__call__", lambda self, feeds: runs.append(self) or run(self, feeds))
    shapes = len({tuple(array.shape for array in batch.values()) for batch in setting.batches})
    together = surveyed(setting.streams())
    assert len(sessions) == shapes + 1
    assert len(runs) == shapes + len(setting.batches)
    monkeypatch.setattr(Survey.groups, "__defaults__", (0,))
    runs.clear()
    apart = surveyed(setting.streams())
    assert len(runs) == shapes + len([wave for wave in setting.waves() if wave]) * len(setting.batches)
    assert list(apart) == list(together)
    for name, given in apart.items():
        torch.testing.assert_close(given.yx, together[name].yx)
        torch.testing.assert_close(given.mean_x, together[name].mean_x)


@pytest.mark.parametrize("case", ["fixed batch", "cnn", "several"])
def test_the_distance_is_of_samples_from_all_over_the_data(folder, case):
    setting = Setting(folder, case, batches=128)
    taken, wanted = [], distance_samples(setting.samples)
    assert wanted < setting.samples / 4
    streams = OnnxStreams(setting.path, lambda: (taken.append(b) or b for b in setting.batches), setting.samples)
    assert streams.distance({}).relative == streams.distance({}).relative == 0
    assert len(taken) == 128  # once: what is needed is kept
    used = [next(iter(batch.values())) for batch in streams._checked.batches()]
    assert 0.9 * wanted <= sum(map(len, used)) <= 1.1 * wanted + 4
    assert case == "several" or {len(rows) for rows in used[:-1]} == {len(taken[0]["x"])}
    first = next(iter(setting.batches[-8:][0]))
    late = {row.tobytes() for batch in setting.batches[-8:] for row in batch[first]}
    assert any(row.tobytes() in late for rows in used for row in rows)


# -- what cannot be done


def test_sites_out_of_reach_have_a_reason(folder):
    text = """agraph (float[n, 6] x, bool c) => (float[n, 6] y)
    <float[6, 6] a, float[6, 6] twice, float[6, 6] inside, float[2, 6] front, float[6, 6] scaled,
     float[4, 4, 2] turned> {
      h = MatMul(x, a)
      k = MatMul(h, twice)
      l = MatMul(k, twice)
      z = If (c) <
        then_branch = then_graph () => (float[n, 6] t) { t = MatMul(l, inside) },
        else_branch = else_graph () => (float[n, 6] e) { e = Identity(x) }
      >
      y = Gemm <alpha = 2.0> (z, scaled)
      shape = Constant <value_ints = [-1, 4, 6]> ()
      image = Reshape(y, shape)
      up = ConvTranspose(image, turned)
      axes = Constant <value_ints = [1, 0]> ()
      xt = Transpose <perm = [1, 0]> (x)
      first = MatMul(front, xt)
    }"""
    path = flows.saved(flows.text_model(text), folder / "odd.onnx")
    batch = {"x": normal(np.random.default_rng(0), 4, 6), "c": np.array(True)}
    streams = OnnxStreams(path, lambda: iter([batch]), 4)
    assert [site.name for site in streams.sites] == ["a"]
    assert streams.unreachable["twice"] == "2 nodes share its weight"
    assert "subgraph" in streams.unreachable["inside"]
    assert "ConvTranspose" in streams.unreachable["turned"]
    assert "scaled" in streams.unreachable["scaled"]
    assert "first operand" in streams.unreachable["front"]
    assert list(surveyed(streams)) == list(sequenced(streams)) == ["a"]
    some = OnnxStreams(path, lambda: iter([batch]), 4, may_split=lambda name: name == "twice")
    assert list(some.unreachable) == ["twice"]
    assert some.sites == ()
    assert sequenced(some) == {}


def test_a_model_whose_output_is_not_floating_has_no_distance(folder):
    text = """agraph (float[n, 6] x) => (int64[n] y) <float[6, 6] a> {
      h = MatMul(x, a)
      y = ArgMax <axis = 1, keepdims = 0> (h)
    }"""
    path = flows.saved(flows.text_model(text), folder / "integer.onnx")
    streams = OnnxStreams(path, lambda: iter([{"x": np.ones((2, 6), np.float32)}]), 2)
    with pytest.raises(ModelError, match="no output of the model is floating"):
        streams.distance({})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_name_the_site(folder, bad):
    setting = Setting(folder, "fixed batch")
    setting.batches[1]["x"][2, 3] = bad
    for work in (surveyed, sequenced):
        with pytest.raises(ModelError, match=r"site 'a'.*inputs.*--exclude 'a'"):
            work(setting.streams())
    with pytest.raises(ModelError, match=r"dense\.onnx.*NaN or infinite"):
        setting.streams().distance({})


def test_a_weight_that_is_not_finite_is_named(folder):
    setting = Setting(folder, "fixed batch")
    model = onnx.load(setting.path)
    (weight,) = (t for t in model.graph.initializer if t.name == "b")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] = math.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "b"))
    onnx.save(model, setting.path)
    for work in (surveyed, sequenced):
        with pytest.raises(ModelError, match=r"site '[bc]'.*--exclude"):
            work(setting.streams())


def test_an_exception_on_the_way_leaves_nothing_behind(folder, monkeypatch):
    monkeypatch.setattr(live_values.LiveValues.__init__, "__defaults__", (0,))
    setting = Setting(folder, "cnn")

    def visit(site, given):
        raise RuntimeError(f"at {site.name}")

    for work in (setting.streams().survey, setting.streams().sequence):
        with pytest.raises(RuntimeError, match="at c1"):
            work(visit)
    assert sorted(file.name for file in folder.iterdir()) == ["dense.onnx", "live"]


def test_outputs_that_no_node_makes_are_passed_over(folder):
    text = """agraph (float[n, 6] x) => (float[n, 6] x, float[6, 6] c, float[n, 6] y)
    <float[6, 6] a, float[6, 6] b, float[6, 6] c> {
      h = MatMul(x, a)
      y = MatMul(h, b)
    }"""
    path = flows.saved(flows.text_model(text), folder / "passed.onnx")
    streams = OnnxStreams(path, lambda: iter([{"x": normal(np.random.default_rng(0), 4, 6)}]), 4)
    site = streams.sites[0]
    left, right = exact_svd(site.load(), 2)
    assert streams.distance({site.name: Replacement("matmul", left, right, torch.zeros(1, 6))}).relative > 0
    assert list(sequenced(streams)) == ["a", "b"]


def test_outputs_of_several_lengths(folder):
    setting = Setting(folder, "packed")
    rng = np.random.default_rng(3)
    setting.batches = [{"x": normal(rng, 2, length, 8)} for length in (3, 6, 4)]
    become = {"down": setting.replacement("down")}
    found = setting.streams().distance(become)
    z, w = (np.concatenate([v["y"].reshape(-1, 8) for v in setting.values(r)]) for r in ({}, become))
    assert found.relative == pytest.approx(output_distance(*map(torch.from_numpy, (z, w))).relative, rel=1e-4)
    assert found.kl is None
    given = surveyed(setting.streams())["qkv"]
    assert given.rows == 2 * (3 + 6 + 4)


def test_weights_behind_a_transpose(folder):
    model = flows.text_model(
        """agraph (float[n, 6] x) => (float[n, 6] y) <float[6, 6] w, float[6, 6] b> {
          turned = Transpose <perm = [1, 0]> (w)
          h = MatMul(x, turned)
          r = Relu(h)
          y = MatMul(r, b)
        }"""
    )
    model.graph.input.append(helper.make_tensor_value_info("never read", 1, [1]))
    setting = Setting(folder, "fixed batch")
    flows.saved(model, setting.path)
    setting.graph = flows.graph_sites(setting.path)
    for batch in setting.batches:
        batch["never read"] = np.zeros(1, np.float32)
    become = {"w": setting.replacement("w")}
    found = sequenced(setting.streams(), lambda site: become.get(site.name))
    flows.assert_moments(found["b"], setting.expected("b", setting.values(), setting.values(become)), tolerance=1e-3)


@pytest.mark.parametrize(
    "add",
    ["Add(x, h)", "com.microsoft.SkipSimplifiedLayerNormalization(x, h, g)", "Mul(x, h)"],
    ids=lambda add: add[:9],
)
def test_a_residual_stream_is_found_where_it_is_added(add):
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) <float[4] g = {{1, 1, 1, 1}}, float[4, 4] w = {{{", ".join("1" * 16)}}}> {{
        h = MatMul(x, w)  y = {add} }}""")
    assert added_to(model) == ({} if "Mul(x" in add else {"h": "x"})


class Words:
    """A language model: token ids --> vectors --> a site --> scores of 4,096 tokens."""

    def __init__(self, folder, samples=64, tokens=1024, size="N, T"):
        rng = np.random.default_rng(3)
        weights = {
            "embed": rng.standard_normal((4096, 8)),
            "w": rng.standard_normal((8, 8)),
            "head": rng.random((8, 4096)),
        }
        self.model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 23]>
            g (int64[{size}] ids) => (float[{size}, 4096] scores) {{
            e = Gather(embed, ids)  x = Reshape(e, sizes)  y = MatMul(x, w)  h = Tanh(y)
            scores = MatMul(h, head) }}""")
        sizes = [int(each) if each.isdigit() else 0 for each in size.split(", ")]
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([*sizes, 8]), "sizes"))
        self.model.graph.initializer.extend(
            onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
        )
        self.path = folder / "words.onnx"
        onnx.save(self.model, self.path)
        self.ids = rng.integers(0, 4096, (samples, tokens))

    def streams(self, ids=None):
        ids = self.ids if ids is None else ids
        self.runs = []

        def feeds():
            for begin in range(0, len(ids), 8):
                self.runs.append(begin)
                yield {"ids": ids[begin : begin + 8]}

        return OnnxStreams(self.path, feeds, len(ids), may_split=lambda name: name == "w")


def test_the_gradients_of_a_text_are_those_of_its_first_tokens(folder):
    words = Words(folder, samples=4, tokens=300)
    found = words.streams().sensitivities()["w"]
    assert found.in_nats
    for begin, is_same in ((256, True), (200, False)):
        other = words.ids.copy()
        other[:, begin:] = 1
        again = words.streams(other).sensitivities()["w"].directions
        assert torch.equal(found.directions, again) == is_same


def test_a_survey_runs_a_part_of_much_text_and_reads_as_many_rows(folder):
    words = Words(folder)
    streams, ran = words.streams(), []
    whole = Survey.gather

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Survey, "gather", lambda self, group: (ran.append(self._batches), whole(self, group))[1])
        streams.survey(lambda site, moments: None)
    assert ran == [4]  # of 16 parts with 4,096 tokens
    assert streams.rows_of("w") == onnx_readings.survey_rows(8, 1)
    assert streams.run_share == 0.25
    sequenced(streams, lambda site: None)
    assert streams.rows_of("w") == moments.row_limit(8)
    few = Words(folder, samples=4).streams()
    sequenced(few, lambda site: None)
    assert few.run_share == 1


@pytest.mark.parametrize("size", ["N, 300", "8, 300", "8, T"])
def test_a_language_model_of_fixed_size_gets_whole_texts(folder, size):
    words = Words(folder, samples=16, tokens=300, size=size)
    streams = words.streams()
    assert streams.sensitivities()["w"].in_nats
    found = sequenced(streams, lambda site: None)["w"]
    flexible = sequenced(Words(folder, samples=16, tokens=300).streams(), lambda site: None)["w"]
    assert found.rows == flexible.rows == 4800
    torch.testing.assert_close(found.xx, flexible.xx)
