"""Settings: declared once, the same through every door, and refused with what to type."""

import dataclasses
import inspect
import tomllib

import click
import numpy as np
import pytest
from click.testing import CliRunner

import rsi_deploy
from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.cli.derived import Verb, settings_options
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import Settings, setting
from rsi_deploy.core.settings.groups import PictureConfig, SamplesConfig, TextSamplesConfig
from rsi_deploy.core.settings.recipe import read_recipe, recipe_text
from rsi_deploy.core.settings.verbs import ExportConfig, InspectConfig, ProfileConfig, VerifyConfig
from rsi_deploy.packaging.settings import PackageConfig
from rsi_deploy.serving.settings import ServeConfig
from tests.release.keywords import FILES, ROOT, keywords


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"calib_size": 0}, "--calib-size must be at least 1, but got 0"),
        ({"min_rank": 0}, "--min-rank must be at least 1, but got 0"),
        ({"rank_multiple": -8}, "--rank-multiple must be at least 1, but got -8"),
        ({"factors": "magic"}, "--factors must be response or weights, but got 'magic'"),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, but got 'tpu'"),
        ({"max_drop": -1.0}, "--max-drop must be at least 0, but got -1"),
        ({"max_drop": 100.5}, "--max-drop must be at most 100, but got 100.5"),
        ({"max_drop": float("nan")}, "but got nan"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"power_iterations": 0}, "--power-iterations must be at least 1"),
        ({"bench_seconds": 0}, "--bench-seconds must be above 0"),
        ({"opset": "new"}, "--opset must be a valid integer"),
        ({"keep_macs": "50"}, "write --keep-macs 50%"),
        ({"max_size": "20"}, "write 20MB"),
        ({"max_latency": "25"}, "write --max-latency 25ms"),
        ({"cost_budget": "soon"}, "--cost-budget takes a time such as 25ms"),
        ({"resize": "0"}, "--resize takes pixels such as 224"),
        ({"mean": "a,b"}, "--mean takes numbers joined by commas"),
        ({"include": 3}, "--include takes texts"),
        ({"keep_mac": 0.5}, "unknown setting 'keep_mac'; did you mean keep_macs?"),
        ({"zzz": 1}, "unknown setting 'zzz'; known are"),
    ],
)
def test_what_is_refused_says_what_to_type(given, words):
    with pytest.raises(UsageError) as caught:
        ExportConfig.of(**given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch": "1,x"}, "--batch takes numbers of 1 or more joined by commas, such as 1,8, but got '1,x'"),
        ({"streams": "0"}, "--streams takes numbers"),
        ({"precision": "2"}, "--precision takes a percentage such as 5%, but got '2'; write 2%"),
        ({"loadgen": "offlin"}, "--loadgen takes SingleStream, MultiStream, Server, Offline, but got 'offlin'"),
        ({"memory_limit": "5"}, "--memory-limit takes a size"),
        ({"bursts": "soon"}, "--bursts takes a time"),
    ],
)
def test_settings_of_bench_that_are_refused(given, words):
    with pytest.raises(UsageError) as caught:
        BenchConfig.of(given)
    assert words in str(caught.value)


def test_settings_of_bench():
    config = BenchConfig.of(batch="8,1,8", loadgen=["offline"], target_latency="0.5s", precision="1%", threads=[2])
    assert (config.batch, config.threads, config.loadgen) == ((8, 1), (2,), ("Offline",))
    assert (config.target_latency, config.precision) == (500, 1)
    assert BenchConfig.of(target_latency=5).target_latency == BenchConfig.of(target_latency="5").target_latency == 5
    assert ServeConfig.of(batch_delay="0").batch_delay == ServeConfig.of(reload_seconds="off").reload_seconds == 0


@pytest.mark.parametrize(
    ("config", "function", "others"),
    [
        (ProfileConfig, rsi_deploy.profile, {"precision", *PictureConfig.model_fields}),
        (
            InspectConfig,
            rsi_deploy.inspect,
            {*SamplesConfig.model_fields, *TextSamplesConfig.model_fields, *PictureConfig.model_fields},
        ),
        (VerifyConfig, rsi_deploy.verify, set()),
        (PackageConfig, rsi_deploy.package, {"target"}),
        (ServeConfig, rsi_deploy.serve, {"api_key_file", "workers", "threads", "canary_share", "max_body", "max_json"}),
    ],
)
def test_functions_have_the_keywords_and_defaults_of_the_settings(config, function, others):
    keywords = inspect.signature(function).parameters
    for name, field in config.model_fields.items():
        if name not in others:
            assert (keywords[name].default or None) == (field.default or None), name


def test_one_value_has_one_form_however_it_is_typed():
    for typed in (0.5, "0.5", "50%"):
        assert ExportConfig.of(keep_macs=typed) == ExportConfig(keep_macs=0.5)
    assert ExportConfig.of(max_size="20mb").max_size == ExportConfig.of(max_size=20_000_000).max_size == 20_000_000
    assert ExportConfig.of(cost_budget="2m").cost_budget == ExportConfig.of(cost_budget=120).cost_budget == 120
    assert ExportConfig.of(input_shape=(1, 8)).input_shape == ExportConfig.of(input_shape="1x8").input_shape == ("1x8",)
    assert ExportConfig.of(include="fc*").include == ("fc*",)
    assert ExportConfig.of(rank=8).rank == "8"


def test_changes_win_and_one_answer_replaces_another():
    base = ExportConfig.of(rank="25%", seed=3, calib="c.npz")
    assert ExportConfig.of(base, keep_macs=0.5) == ExportConfig.of(keep_macs=0.5, seed=3, calib="c.npz")
    assert ExportConfig.of(base, seed=4).rank == "25%"
    assert ExportConfig.of(base, calib=None).calib is None
    assert ExportConfig.of(base) == base


VALUES = {
    "rank": "25%",
    "keep_macs": 0.125,
    "max_size": 20_000_000,
    "max_latency": "1500us",
    "cost_budget": 0.25,
    "checkpoint": 'odd "name"\n\\ \x7f\u00e9.pth',
    "input_shape": ["ids=1x8", "mask=1x8"],
    "mean": (0.485, 0.456),
    "resize": (224, 200),
    "crop": "none",
    "seed": 7,
    "power_iterations": "auto",
    "measure": False,
    "opset": 21,
}


def test_a_recipe_holds_every_setting(tmp_path):
    config = ExportConfig.of(VALUES)
    text = recipe_text("export", "m.onnx", config)
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    read = read_recipe(tmp_path / "r.toml", "export")
    assert read.pop("model") == "m.onnx"
    again = ExportConfig.of(read)
    for name in ExportConfig.model_fields:
        assert getattr(again, name) == getattr(config, name), name
    assert recipe_text("export", "m.onnx", again) == text


def test_a_recipe_says_what_it_cannot_hold():
    text = recipe_text("export", object(), ExportConfig.of(calib={"x": np.zeros(3)}, rank=4))
    assert "# model was an object in memory: name a file here" in text
    assert "# calib was an object in memory" in text
    assert tomllib.loads(text)["rank"] == "4"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rank = 25%", "is not TOML: .*; write for example rank"),
        (b"\xff", "is not TOML"),
        (b'verb = "sweep"\npoints = 3', "is for sweep; type rsi-deploy sweep --recipe"),
        (b"#" * (2 << 20), "more than 1 MiB"),
        (None, "No such file or directory; expected a TOML file"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, content, words):
    if content is not None:
        (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_recipe(tmp_path / "r.toml", "export")


@pytest.mark.parametrize("file", FILES)
def test_keywords_of_python_are_the_fields(file):
    verb, config = FILES[file]
    assert (ROOT / file).read_text(encoding="utf-8") == keywords(verb, config), "python -m tests.release.keywords"


@pytest.mark.parametrize("config", [config for _, config in FILES.values()])
def test_every_setting_has_help_a_panel_and_a_place_in_the_schema(config):
    described = config.model_json_schema()["properties"]
    panels = config.panels()
    assert sorted(name for names in panels.values() for name in names) == sorted(config.model_fields)
    assert all(panels)
    for name in config.model_fields:
        assert described[name]["description"].endswith((".", "]", ")")), name


@dataclasses.dataclass
class Use:
    """What a verb was called with."""

    settings: Settings | None = None


class NewConfig(Settings, panel="New"):
    """Settings with one more option: this field is all that the command line needs."""

    sharpness: float = setting(0.5, "How sharp.", ge=0, le=1)
    loud: bool = setting(True, "Make noise.", option={"off": "Make no noise."})
    words: tuple[str, ...] = setting((), "Some words; repeatable.")


def test_a_new_option_is_its_field_and_its_use(tmp_path):
    use = Use()

    @click.command(cls=Verb)
    @settings_options(NewConfig, recipe=True)
    def verb(settings):
        use.settings = settings

    def call(*argv):
        return CliRunner().invoke(verb, argv, catch_exceptions=True)

    assert call().exit_code == 0
    assert use.settings == NewConfig()
    call("--sharpness", "0.75", "--no-loud", "--words", "a", "--words", "b")
    assert use.settings == NewConfig(sharpness=0.75, loud=False, words=("a", "b"))
    assert "but got 2" in str(call("--sharpness", "2").exception)
    (tmp_path / "r.toml").write_text("loud = false\nsharpness = 0.25")
    call("--recipe", str(tmp_path / "r.toml"), "--loud")
    assert use.settings == NewConfig(sharpness=0.25, loud=True)
    assert "--sharpness" not in call("--help").output
    page = call("--help-all").output
    assert "How sharp. (default: 0.5; at least 0; at most 1)" in page
    assert "--no-loud" in page
    assert "Make no noise." in page
