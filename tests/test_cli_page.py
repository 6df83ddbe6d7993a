import pytest
from bench_documents import arm, cell, document
from nets import mlp_onnx
from pages import assert_self_contained

from rsi_deploy.cli import run
from rsi_deploy.cli.page import check_page, write_page
from rsi_deploy.core.errors import UsageError


def test_a_page_is_written_whole(tmp_path):
    target = check_page(str(tmp_path / "bench.html"))
    write_page(document(cell(arm("a", 2.0))), target)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.html"]
    assert "2 ms a call" in assert_self_contained(target.read_text(encoding="utf-8")).words
    assert target.stat().st_mode & 0o777 == 0o644


def test_no_page_where_none_is_asked_for():
    assert check_page(None) is None
    write_page(document(cell(arm("a", 2.0))), None)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    for name in ("mine.html", "."):
        with pytest.raises(UsageError, match="is there already; type another name"):
            check_page(str(tmp_path / name))
    assert (tmp_path / "mine.html").read_text() == "mine"
    with pytest.raises(UsageError, match="cannot write into .*nowhere; type another place for --html"):
        check_page(str(tmp_path / "nowhere" / "b.html"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(document):
        raise error

    monkeypatch.setattr("rsi_deploy.report.pages.bench.bench_page", fail)
    with pytest.raises(error):
        write_page(document(cell(arm("a", 2.0))), tmp_path / "b.html")
    assert list(tmp_path.iterdir()) == []


def test_bench_writes_it(tmp_path, capsys):
    models = [str(mlp_onnx(tmp_path / f"{name}.onnx")) for name in "ab"]
    options = ["--seconds", "0.2", "--html", str(tmp_path / "bench.html")]
    assert run(["bench", *models, *options]) == 0
    page = assert_self_contained((tmp_path / "bench.html").read_text(encoding="utf-8"))
    assert [row[1] for row in page.table("Medians")] == ["a.onnx", "b.onnx"]
    assert run(["bench", *models, *options]) == 2
    assert "is there already" in capsys.readouterr().err
