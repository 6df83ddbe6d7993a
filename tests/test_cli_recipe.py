"""`--recipe`, `--dry-run` and `schema VERB`: a request is stored, shown and run again."""

import json
import tomllib

import jsonschema
import numpy as np
import pytest
from nets import SIZES, mlp_onnx

import rsi_deploy
from rsi_deploy.cli import run

QUICK = ["--no-bench", "--allow-larger"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, calibration data and a bundle."""
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlp_onnx(folder / "m.onnx")
        np.savez("c.npz", x=np.random.default_rng(3).standard_normal((128, SIZES[0])).astype(np.float32))
        argv = ["export", "m.onnx", "--keep-macs", "80%", "--calib", "c.npz", "--exclude", "fc2", "--seed", "3"]
        assert run([*argv, *QUICK, "-o", "b"]) == 0
    return folder


@pytest.fixture
def here(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    capsys.readouterr()
    return place


def test_a_bundle_is_made_again_by_its_recipe(here, tmp_path):
    assert run(["export", "--recipe", "b/recipe.toml", "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (here / "b" / "model.onnx").read_bytes()
    assert (tmp_path / "again" / "recipe.toml").read_bytes() == (here / "b" / "recipe.toml").read_bytes()
    report = rsi_deploy.read_report("b")
    assert report.recipe == (here / "b" / "recipe.toml").read_text()
    assert rsi_deploy.verify("b").ok
    assert "recipe.toml" in json.loads((here / "b" / "manifest.json").read_text())["files"]


def test_python_and_the_command_line_make_the_same_request(here, tmp_path):
    settings = {
        "keep_macs": 0.8,
        "calib": "c.npz",
        "exclude": ["fc2"],
        "seed": 3,
        "measure": False,
        "allow_larger": True,
    }
    by_name = rsi_deploy.export("m.onnx", tmp_path / "n", **settings)
    config = rsi_deploy.ExportConfig.of(settings | {"rank": None, "seed": 9})
    by_object = rsi_deploy.export("m.onnx", tmp_path / "o", config, seed=3)
    assert by_name.recipe == by_object.recipe == (here / "b" / "recipe.toml").read_text()


def test_options_win_over_the_recipe(here, capsys):
    assert run(["export", "--recipe", "b/recipe.toml", "--rank", "4", "--seed", "5", "--bench", "--dry-run"]) == 0
    recipe = tomllib.loads(capsys.readouterr().out)
    assert (recipe["rank"], recipe["seed"], recipe["measure"], recipe["exclude"]) == ("4", 5, True, ["fc2"])
    assert "keep_macs" not in recipe


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank", "4"], ["ranks: --rank 4", "fc1  32 x 12  rank 4", "fc2  24 x 32  dense: excluded"]),
        (["--keep-macs", "0.6", "--calib", "c.npz"], ["fitted to calibration data", "decided by --keep-macs 60%"]),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(here, capsys, argv, words):
    before = sorted(here.rglob("*"))
    assert run(["export", "m.onnx", *argv, "--exclude", "fc2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    assert tomllib.loads(out)["model"] == "m.onnx", "the whole output is a recipe"
    assert run(["export", "m.onnx", *argv, "--dry-run", "--json"]) == 0
    assert {site["name"] for site in json.loads(capsys.readouterr().out)["sites"]} == {"fc1", "fc2", "head"}
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ('model = "m.onnx"\nkeep_mac = 0.5', [], "unknown setting 'keep_mac'; did you mean keep_macs?"),
        ('model = "m.onnx"\nkeep_macs = "50"', [], "write --keep-macs 50%"),
        ('model = "m.onnx"\nmeasure = 3', [], "--measure must be a valid boolean"),
        ('model = "m.onnx"\nrank = 4', ["--max-size", "12"], "--max-size takes a size such as 512MB"),
        ('model = "m.onnx"', [], "give exactly one of --rank"),
        ('model = "m.onnx"\nrank = 4\nkeep_macs = 0.5', [], "but got --rank and --keep-macs"),
        ("rank = 4", [], "export takes a MODEL"),
        ('verb = "sweep"', [], "is for sweep"),
        ('verb = "swep"\nrank = 4', [], "verb must be export or sweep, but got 'swep'"),
        ("verb = [1]", [], "verb must be export or sweep"),
        ("model = 3\nrank = 4", [], "model must be a text, but got 3"),
        ("rank = [", [], "is not TOML"),
    ],
)
def test_recipes_and_units_that_are_refused(here, tmp_path, capsys, text, argv, words):
    (tmp_path / "r.toml").write_text(text)
    assert run(["export", "--recipe", str(tmp_path / "r.toml"), *argv, "-o", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "argv", "is_named"),
    [
        ("keep_mac = 0.5", [], True),
        ("rank = 4\nmeasure = 3", ["--rank", "5"], True),
        ("rank = 4", ["--max-size", "12"], False),
        ('keep_macs = "50"', ["--keep-macs", "50"], False),
    ],
)
def test_an_error_names_the_recipe_only_where_the_fault_is(here, tmp_path, capsys, text, argv, is_named):
    (tmp_path / "r.toml").write_text(f'model = "m.onnx"\n{text}')
    assert run(["export", "--recipe", str(tmp_path / "r.toml"), *argv, "-o", str(tmp_path / "x")]) == 2
    assert (f"--recipe {tmp_path / 'r.toml'}: " in capsys.readouterr().err) == is_named


@pytest.mark.parametrize("verb", ["export", "sweep"])
def test_the_schema_of_recipes(capsys, verb):
    assert run(["schema", verb]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "keep_macs" in schema["properties"] or "highest" in schema["properties"]
    assert run(["schema", "nonsense"]) == 2
    assert "schema takes report, export, sweep" in capsys.readouterr().err


def test_help_has_panels_and_few_options_first(capsys):
    assert run(["export", "--help"]) == 0
    short = capsys.readouterr().out
    assert run(["export", "--help-all"]) == 0
    whole = capsys.readouterr().out
    for panel in ("Model:", "Size:", "Calibration:", "Measuring:", "Output:"):
        assert f"\n{panel}\n" in short
    assert "\nKernel:\n" in whole
    assert "\nKernel:\n" not in short
    assert "--oversampling" in whole
    assert "--oversampling" not in short
