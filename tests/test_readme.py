"""What README.md and the pages of docs/ say can be typed, and where the samples are enough it is really run."""

import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from rsi_deploy.cli import cli, run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<mark><!-- run -->\n)?^[ ]*```(?P<kind>\w+)\n(?P<text>.*?)^[ ]*```", re.S | re.M)
LEADS = "&&", "||", "|", ";"
"""Words that a command of a shell line may follow."""


def commands(text):
    """The rsi-deploy command lines of a shell block, as words; comments, continuations and redirections taken out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quoted argument that goes over lines: of curl
            continue
        words = shlex.split(words[2]) if words[:1] == ["ssh"] else words
        starts = [place for place, word in enumerate(words) if word.endswith("rsi-deploy") and "=" not in word]
        if starts and (starts[0] == 0 or words[starts[0] - 1] in LEADS):
            command = words[starts[0] + 1 :]
            ends = [place for place, word in enumerate(command) if word in (*LEADS, ">")]
            found.append(command[: ends[0]] if ends else command)
    return found


def blocks(page, kind):
    """`(marked to be run, text)` of each block of a kind."""
    return [(bool(b["mark"]), b["text"]) for b in BLOCK.finditer(page.read_text(encoding="utf-8")) if b["kind"] == kind]


TYPED = [(page, command) for page in PAGES for _, text in blocks(page, "sh") for command in commands(text)]
MARKED = {page: [text for marked, text in blocks(page, "sh") if marked] for page in PAGES}
RUNNABLE = [page for page in PAGES if MARKED[page]]


def parse(command):
    """Parse a command line as the program would; nothing runs."""
    verb = cli.commands[command[0]]
    assert verb.make_context(command[0], list(command[1:])).params is not None


def type_all(page):
    """Run every marked command of a page in the current folder.

    Raises:
        AssertionError: one ended with another exit code than 0.
    """
    for text in MARKED[page]:
        for command in commands(text):
            assert run(command) == 0, command


@pytest.mark.parametrize(("page", "command"), TYPED, ids=lambda v: v.name if isinstance(v, Path) else " ".join(v))
def test_every_command_parses(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "key.txt").touch()  # a file of `serve --api-key-file`
    parse(command)


@pytest.mark.parametrize(
    "line",
    [
        "rsi-deploy export m.onnx --ranks 3 -o x",
        "rsi-deploy export m.onnx --rank 25%",
        "rsi-deploy bench a.onnx --seconds many",
        "ssh board 'rsi/bin/rsi-deploy bench a.onnx --pinned 0' > board.json",
        "cd x && rsi-deploy serve bundle --port 8000",
    ],
)
def test_a_wrong_command_does_not_parse(line):
    (command,) = commands(line)
    with pytest.raises(click.UsageError):
        parse(command)


def test_every_line_is_found():
    """Every shell line that begins with the program is among the commands, in README, quickstart and each guide."""
    assert len(TYPED) >= 60
    for page in PAGES:
        lines = [line for _, text in blocks(page, "sh") for line in text.splitlines()]
        begun = [line for line in lines if re.match(r"\s*(\.venv/bin/)?rsi-deploy ", line)]
        assert len([None for at, _ in TYPED if at == page]) >= len(begun), page


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the samples and what the quickstart makes there, which the guides begin with."""
    folder = tmp_path_factory.mktemp("typed")
    shutil.copytree(ROOT / "samples", folder / "samples", ignore=shutil.ignore_patterns("__pycache__"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        type_all(QUICKSTART)
        yield folder
    finally:
        os.chdir(before)


def test_every_guide_that_samples_suffice_for_is_run():
    guides = {"budget", "calibrate", "latency", "sweeps", "data", "providers", "benchmarking", "packaging", "precision"}
    assert {page.stem for page in RUNNABLE} >= guides | {"quickstart", "reproducibility"}


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page != QUICKSTART], ids=lambda page: page.stem)
def test_marked_commands_run(page, place):
    type_all(page)
    if page.stem == "reproducibility":
        assert (place / "once" / "model.onnx").read_bytes() == (place / "again" / "model.onnx").read_bytes()


def test_a_command_that_fails_is_noticed(place, monkeypatch):
    wrong = "rsi-deploy verify no-bundle\n"
    assert commands(wrong) == [["verify", "no-bundle"]]
    monkeypatch.setitem(MARKED, README, [wrong])
    with pytest.raises(AssertionError, match="no-bundle"):
        type_all(README)


def test_the_demo_is_the_makefile_s():
    recipe = re.search(r"^demo:.*?\n\t(.*?)\n\n", (ROOT / "Makefile").read_text(), re.S | re.M)[1].replace("\\\n", " ")
    make = shlex.split(recipe.replace("$(BIN)/rsi-deploy ", "").replace("$(DEMO)", "demo-bundle"))
    for page in (README, QUICKSTART):
        shown = next(c for at, c in TYPED if at == page and "demo-bundle" in c)
        assert set(make) - {"--force"} == set(shown)


@pytest.mark.parametrize("page", [README, QUICKSTART], ids=lambda page: page.stem)
def test_the_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [text for _, text in blocks(page, "python")]
    names = {}
    exec(code, names)
    assert names["report"].dense.bytes > names["report"].compressed.bytes
    assert (tmp_path / "mlp-bundle" / "model.onnx").is_file()
    assert any(record.decision == "split" for record in names["records"])


def test_every_verb_is_in_the_table():
    table = (ROOT / "docs" / "reference" / "bundle.md").read_text(encoding="utf-8")
    for verb in cli.commands:
        assert f"| `{verb}" in table, verb


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8192


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(links) >= 15
    assert [link for link in links if not (ROOT / link).exists()] == []
