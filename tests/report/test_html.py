import json
import re
import subprocess
import sys

import pytest
from nets import labelled, mlp_onnx
from pages import PageReader, assert_self_contained

from rsi_deploy import export, verify
from rsi_deploy.core.sites import SiteRecord, Spectrum
from rsi_deploy.core.text import LONGEST
from rsi_deploy.report.pages.errors import MOST
from rsi_deploy.report.pages.html import source_of
from rsi_deploy.report.pages.report import report_page
from rsi_deploy.report.schema import read_report

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</title></style></svg><h1>",
    "{{ 7 * 7 }}{% raw %}",
    "bell\x07 nul\x00 escape\x1b[31m",
    "\u202egnirts\u202c \u05e9\u05dc\u05d5\u05dd",
    "endless." * 200,
    "&lt;b&gt; &amp; \ud800",
    "caf\u00e9 \U0001f600",
    "",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    data = labelled(root / "d.npz", mlp_onnx(root / "m.onnx"))
    export(
        str(root / "m.onnx"),
        root / "b",
        rank=6,
        data=data,
        calib=data,
        allow_shared_data=True,
        bench_seconds=0.2,
        allow_slower=True,
    )
    export(str(root / "m.onnx"), root / "plain", rank=6, exclude=["fc2"], measure=False, allow_larger=True)
    return root


@pytest.fixture(scope="module")
def report(bundle):
    return read_report(bundle / "b")


def page_of(report):
    return report_page(report, report.model_dump_json())


def site(name, **more):
    known = {
        "kind": "Gemm",
        "out_features": 64,
        "in_features": 32,
        "break_even_rank": 64 * 32 / 96,
        "rank": 8,
        "decision": "split",
        "reason": "split",
        "params_dense": 2048,
        "params_compressed": 768,
        "frobenius_error": 0.5,
        "spectral_error": 0.25,
        "normalized_error": 1.03,
        "normalized_error_kind": "exact",
        "spectrum": Spectrum(of="weight", ranks=(1, 8, 32), values=(1.0, 0.3, 0.01), full_rank=32),
    }
    return SiteRecord(name=name, **known | more)


# -- a page from a real export


@pytest.mark.parametrize("name", ["b", "plain"])
def test_the_page_is_self_contained(bundle, name):
    page = assert_self_contained((bundle / name / "report.html").read_text(encoding="utf-8"))
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(pictures) >= 4
    assert all(attrs["role"] == "img" and attrs["aria-labelledby"] for attrs in pictures)
    assert "has no pictures" not in page.words


def test_the_page_has_the_numbers_of_the_report(bundle, report):
    page = PageReader((bundle / "b" / "report.html").read_text(encoding="utf-8"))
    dense, compressed = report.latency.arms
    result = {row[0]: row[1:] for row in page.table("Accuracy, size")}
    assert result["parameters"][:2] == [f"{report.dense.params:,}", f"{report.compressed.params:,}"]
    assert result["top-1"][0] == f"{report.accuracy.dense.top1:.2f} %"
    assert result["latency, batch 1"][2] == compressed.verdict
    assert [row[1] for row in page.table("Milliseconds")] == [f"{arm.median_ms:.3f}" for arm in (dense, compressed)]
    rows = {row[0]: row for row in page.table("Every site")}
    assert list(rows) == [s.name for s in report.sites]
    for s in report.sites:
        assert rows[s.name][3] == str(s.rank or "")
        assert rows[s.name][-1] == (s.decision if s.reason == s.decision else f"{s.decision}: {s.reason}")
    responses = {row[0]: row[2] for row in page.table("Response errors")}
    assert responses == {s.name: f"{100 * s.held_out_error:.2g} %" for s in report.split_sites}
    fitted = {row[0]: row[3] for row in page.table("Response errors")}
    assert fitted == {s.name: f"{100 * s.response_error:.2g} %" for s in report.split_sites}
    assert f"{report.dense.bytes / report.compressed.bytes:.2f}x smaller" in page.words
    c = report.calibration
    quality = {row[0]: row for row in page.table("Outputs on calibration data")}
    assert quality["samples"][1:] == [str(c.check_samples), str(c.in_sample.samples)] == ["12", "48"]
    assert quality["agreement"][1].startswith(f"{c.checked.agreement:.1f} % [")
    assert quality["agreement"][2] == f"{c.in_sample.agreement:.1f} %"
    assert "too few samples for a verdict: the check part has 12" in page.words.lower()
    assert [row[2] for row in page.table("Relative error")] == [
        "not measured",
        f"{report.verification.surgery.relative_l2:.1e}",
        f"{report.verification.approximation.relative_l2:.3f}",
    ]


def test_every_bar_and_curve_is_drawn(bundle, report):
    page = (bundle / "b" / "report.html").read_text(encoding="utf-8")
    for s in report.split_sites:
        assert f"<title>{s.name}, compressed: {s.params_compressed:,}</title>" in page
        assert f"<title>{s.name}: rank {s.rank} of break-even {s.break_even_rank:.1f}</title>" in page
    assert page.count('id="spectra-title"') == 1


def test_the_spectra_are_those_of_the_weights(bundle):
    import numpy as np
    from nets import initializers

    weights = initializers(bundle / "m.onnx")
    for s in read_report(bundle / "plain").split_sites:
        values = np.linalg.svd(weights[f"{s.name}.weight"], compute_uv=False)
        assert s.spectrum.of == "weight"
        assert s.rank in s.spectrum.ranks
        assert s.spectrum.full_rank == s.spectrum.ranks[-1] == min(weights[f"{s.name}.weight"].shape)
        np.testing.assert_allclose(
            s.spectrum.values, (values / values[0])[np.array(s.spectrum.ranks) - 1], rtol=1e-3, atol=1e-6
        )
        swapped = initializers(bundle / "m.onnx")["fc2.weight"]
        assert not np.allclose(s.spectrum.values[:5], np.linalg.svd(swapped, compute_uv=False)[:5], rtol=1e-3)


def test_factors_fitted_to_data_have_the_spectrum_of_the_response(report):
    for s in report.split_sites:
        assert s.spectrum.of == "response"
        assert list(s.spectrum.values) == sorted(s.spectrum.values, reverse=True)


def test_the_same_report_gives_the_same_page(report):
    assert page_of(report) == page_of(report)


# -- verify


def test_verify_checks_that_the_page_belongs_to_the_report(bundle, tmp_path):
    import shutil

    def claim(folder):
        (found,) = [c for c in verify(folder).claims if c.name == "page"]
        return found.status

    copy = shutil.copytree(bundle / "plain", tmp_path / "b")
    assert claim(copy) == "holds"
    (copy / "report.html").write_bytes((bundle / "b" / "report.html").read_bytes())
    assert claim(copy) == "broken"
    (copy / "report.html").write_bytes(b"\xff\xfe not a page")
    assert claim(copy) == "broken"
    (copy / "report.html").unlink()
    assert claim(copy) == "not checked"


def test_source_of_is_the_hash_of_the_document(bundle):
    import hashlib

    digest = hashlib.sha256((bundle / "b" / "report.json").read_bytes()).hexdigest()
    assert source_of(bundle / "b" / "report.html") == digest


# -- hostile contents


def test_hostile_names_stay_text(report):
    sites = tuple(site(name, reason=name or "split") for name in HOSTILE)
    hostile = report.model_copy(
        update={
            "sites": sites,
            "notes": tuple(HOSTILE),
            "command": HOSTILE[0],
            "source": report.source.model_copy(update={"model": HOSTILE[1], "notes": (HOSTILE[2],)}),
            "files": {HOSTILE[0]: "0" * 64},
            "stages": tuple(stage.model_copy(update={"name": HOSTILE[2]}) for stage in report.stages[:1]),
            "environment": report.environment.model_copy(update={"cpu": HOSTILE[0], "versions": {HOSTILE[1]: "1"}}),
        }
    )
    text = report_page(hostile, "{}")
    page = assert_self_contained(text)
    text.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert len(page.table("Every site")) == len(HOSTILE)
    assert page.table("Every site")[0][0] == HOSTILE[0]
    assert "{{ 7 * 7 }}" in page.words  # and not 49
    assert "escape\\x1b[31m" in page.words
    assert max(map(len, re.split(r"[\s<>]", page.words))) < 2 * LONGEST
    with pytest.raises(AssertionError):  # the check itself finds a tag
        assert_self_contained(text.replace("&lt;script&gt;", "<script>", 1))


@pytest.mark.parametrize(
    "missing",
    [
        {"latency": None},
        {"accuracy": None},
        {"calibration": None, "accuracy": None, "softmax_bound": None},
        {"sites": ()},
        {"stages": (), "files": {}, "notes": ()},
    ],
    ids=lambda missing: "+".join(missing),
)
def test_missing_results_are_left_out_and_remarked(report, missing):
    page = assert_self_contained(page_of(report.model_copy(update=missing)))
    assert "None" not in page.words
    assert "nan" not in page.words.lower().split()
    if "latency" in missing:
        assert "not measured" in page.words
        assert "Latency was not measured" in page.words
    if "accuracy" in missing:
        assert "Accuracy was not measured" in page.words
    if "sites" in missing:
        assert "0 of 0 weights" in page.words
        assert not {"decisions", "ranks"} & set(page.ids())


def test_a_model_that_was_not_verified_is_remarked(report):
    gone = report.verification.model_copy(update={"surgery": None, "approximation": None})
    page = assert_self_contained(page_of(report.model_copy(update={"verification": gone, "latency": None})))
    assert "was not verified" in page.words


@pytest.mark.parametrize(
    ("interval", "tone", "said"),
    [((0.5, 0.6), "bad", "is slower than the dense one"), ((0.9, 1.1), "neutral", "is not shown to be faster")],
)
def test_a_slowdown_comes_first(report, interval, tone, said):
    arms = list(report.latency.arms)
    arms[1] = arms[1].model_copy(update={"speedup_interval": interval, "verdict": "the verdict", "blocks": 50})
    latency = report.latency.model_copy(update={"arms": tuple(arms)})
    text = page_of(report.model_copy(update={"latency": latency}))
    assert said in text[: text.index('id="result"')]
    assert re.search(rf'class="tile {tone}">\s*<span class="label">Latency', text)


def test_a_model_that_grew_is_not_called_smaller(report):
    bigger = report.compressed.model_copy(update={"bytes": 2 * report.dense.bytes})
    page = PageReader(page_of(report.model_copy(update={"compressed": bigger})))
    assert "2.00x larger" in page.words


def test_two_thousand_sites_stay_small(report):
    long = "model.decoder.layers.{}.self_attention.query_key_value"
    sites = tuple(site(long.format(i), params_dense=2048 + i) for i in range(2000))
    text = page_of(report.model_copy(update={"sites": sites}))
    page = assert_self_contained(text)
    assert len(text.encode()) < 2_000_000
    assert len(page.table("Every site")) == 2000
    (caption,) = [c for c in page.tables if c.startswith("Ranks of")]
    assert f"the {MOST} largest of 2000" in caption
    assert page.table("Ranks of")[-1][0] == long.format(1999)


# -- without the drawing library


def test_without_the_library_the_page_has_its_tables(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "rsi_deploy.report.pages.charts", None)
    text = page_of(report)
    page = assert_self_contained(text)
    assert "This page has no pictures" in page.words
    assert "pip install vl-convert-python" in page.words
    assert "<svg" not in text
    assert len(page.table("Every site")) == len(report.sites)


def test_the_library_is_loaded_only_for_a_page():
    code = (
        "import sys, json, rsi_deploy.exporting.api, rsi_deploy.cli, rsi_deploy.verifying.api\n"
        "import rsi_deploy.report.pages.html, rsi_deploy.cli.bench, rsi_deploy.cli.export\n"
        "print(json.dumps(sorted({'vl_convert', 'rsi_deploy.report.pages.charts'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
