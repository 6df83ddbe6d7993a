import re
from pathlib import Path

import graph_passes
from graph_passes.operators import PASSES, UNSPLIT

FOLDER = Path(graph_passes.__file__).parent
REASON = re.compile(r'(?:reason\s*=\s*|return |who = |, )f?"([a-zA-Z][^"]* [^"]*)"')


def test_every_reason_stands_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    # no reasons in there
    records = {
        "records",
        "split_all",
        "split_pass",
        "answers",
        "constants",
        "names",
        "cleanup",
        "mac_counts",
        "__init__",
    }
    sources = [file for file in FOLDER.glob("*.py") if file.stem not in records]
    reasons = [reason for file in sources for reason in REASON.findall(file.read_text())]
    assert len(reasons) >= 30
    for reason in reasons:
        for fixed in re.split(r"\{[^}]*\}", reason):
            assert fixed.strip(" '") in readme, reason


def test_example_runs(tmp_path, monkeypatch):
    from split_checks import graph, ir, numbers

    monkeypatch.chdir(tmp_path)
    model = graph("h = MatMul(x, w)  y = MatMul(h, v)", w=numbers(6, 80), v=numbers(80, 4))
    ir.save(model, "model.onnx")
    (example,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "small.onnx").exists()


def test_the_pass_of_the_page_on_passes_runs():
    page = (FOLDER.parent / "docs" / "contributing" / "split-pass.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "split-pass.md", "exec"), {})


def test_every_member_of_a_pass_stands_on_the_page_on_passes():
    page = (FOLDER.parent / "docs" / "contributing" / "split-pass.md").read_text()
    own = {name for name in vars(graph_passes.SplitPass) if not name.startswith("_")} | {"op_type", "form", "operands"}
    for name in own - {"call"}:
        assert f"`{name}" in page, name


def test_every_operator_stands_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    for _, op_type in (*((each.domain, each.op_type) for each in PASSES), *UNSPLIT):
        assert f"`{op_type}" in readme
