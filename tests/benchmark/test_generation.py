"""`bench --prompt --generate`: phases and verdicts on a clock that is made up, tiny models, bad input."""

import io
import json
import sys
import time

import numpy as np
import pytest
import text_models
from generating_models import CONTEXT, changed, needs_genai, write_generating
from rich.console import Console
from test_privacy import blocked
from text_models import WORDS, write_text

from bench import small
from rsi_deploy.benchmark.ci_gate import check_gates
from rsi_deploy.benchmark.compare import compare_documents
from rsi_deploy.benchmark.generation import measuring
from rsi_deploy.benchmark.generation.genai import GenaiModel
from rsi_deploy.benchmark.generation.request import GenerationRequest, generation_request, random_prompt
from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.report.pages.bench import bench_page
from rsi_deploy.report.tables.bench import print_document
from rsi_deploy.runtime.genai import GenaiFolder


def folder_of(path, **facts):
    known = {"vocabulary": 50, "longest": None, "special": frozenset(), "provider": "CPUExecutionProvider"}
    return GenaiFolder(path=path, file=path / "model.onnx", **{**known, "session": {}, **facts})


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measure models whose tokens take what `times(label)` says: ms of the first token and of the next ones."""
    order = []
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measuring, "generation_memory", lambda *_, **__: ())

    def measure(times, labels=("a", "b"), facts=None, **changes):
        class Model:
            def __init__(self, folder):
                self.label = folder.path.name

            def generate(self, prompt, count):
                assert len(prompt) == 10
                order.append(self.label)
                first, following = times(self.label)
                found = np.asarray([first, *np.broadcast_to(following, count - 1)], np.float64)
                now[0] += found.sum() / 1e3
                return found

        monkeypatch.setattr(GenaiModel, "load", lambda folder, threads: Model(folder))
        folders = []
        for label in labels:
            (tmp_path / label).mkdir(exist_ok=True)
            small.perceptron(tmp_path / label / "model.onnx", width=4, layers=1)
            folders.append(folder_of(tmp_path / label, **(facts or {}).get(label, {})))
        request = {"prompt": np.arange(10, dtype=np.int32), "source": "10 random tokens", "generate": 21}
        request |= {"folders": tuple(folders), "labels": tuple(labels), "seconds": 30.0, **changes}
        order.clear()
        return measuring.run_generation(GenerationRequest(**request))

    measure.order = order
    return measure


def noisy(rng, **means):
    return lambda label: (rng.normal(means[label][0], 0.2), rng.normal(means[label][1], 0.02, 20))


def test_phases_have_their_own_speeds_and_verdicts(measured):
    document = measured(noisy(np.random.default_rng(0), a=(50, 10), b=(50, 15)))
    prefill, decode = document.cells
    assert (prefill.name, decode.name) == ("first token", "next token")
    assert prefill.arms[1].verdict.startswith("no difference shown")
    assert decode.arms[1].verdict.startswith("1.50x slower")
    assert decode.arms[1].speedup_interval[1] < 0.7 < 0.99 < prefill.arms[1].speedup_interval[1]
    assert [cell.arms[0].n for cell in document.cells] == [prefill.arms[0].blocks, 20 * prefill.arms[0].blocks]
    a, b = document.generation
    assert (a.label, a.prompt_tokens, a.generated_tokens) == ("a", 10, 21)
    assert a.first_token_ms == pytest.approx(50, rel=0.01)
    assert a.prefill_per_second == pytest.approx(10 / 0.050, rel=0.01)
    assert b.decode_per_second == pytest.approx(1 / 0.015, rel=0.01)
    for low, value, high in (
        (a.first_token_interval_ms[0], a.first_token_ms, a.first_token_interval_ms[1]),
        (a.prefill_per_second_interval[0], a.prefill_per_second, a.prefill_per_second_interval[1]),
        (b.decode_per_second_interval[0], b.decode_per_second, b.decode_per_second_interval[1]),
    ):
        assert 0 < low <= value <= high < 1.1 * low
    assert not document.partial
    assert decode.inputs == {"prompt": "10 random tokens", "generated": "21 tokens"}


def test_models_take_turns_and_warming_up_does_not_count(measured):
    cold = {"a", "b"}

    def times(label):
        is_first = label in cold
        cold.discard(label)
        return (900, 90) if is_first else (50, 10)

    document = measured(times, seconds=20)
    blocks = document.cells[0].arms[0].blocks
    warm_up = len(measured.order) - 2 * blocks
    assert warm_up >= 2
    pairs = [tuple(measured.order[i : i + 2]) for i in range(warm_up, len(measured.order), 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}
    assert [arm.quantiles_ms[100] for cell in document.cells for arm in cell.arms] == [50, 50, 10, 10]


@pytest.mark.parametrize(("spread", "stopped"), [((0, 0), "precise"), ((25, 0), "time"), ((0, 5), "time")])
def test_both_phases_must_be_precise(measured, spread, stopped):
    rng = np.random.default_rng(0)
    document = measured(lambda _: (50 + rng.uniform(0, spread[0]), 10 + rng.uniform(0, spread[1])), seconds=15)
    assert {cell.stopped for cell in document.cells} == {stopped}


@pytest.mark.parametrize(("blocks", "kept"), [(3, False), (7, True)])
def test_an_interrupted_run_keeps_whole_blocks(measured, blocks, kept):
    def times(_):
        if len(measured.order) > 2 + 2 * blocks + 1:
            raise KeyboardInterrupt
        return 50, 10

    if not kept:
        with pytest.raises(KeyboardInterrupt):
            measured(times)
        return
    document = measured(times)
    assert document.partial
    assert {arm.blocks for cell in document.cells for arm in cell.arms} == {blocks}
    assert document.memory == ()


def test_a_folder_with_other_settings_is_noted(measured):
    facts = {"b": {"session": {"intra_op_num_threads": "1"}}}
    document = measured(lambda _: (50, 10), facts=facts, seconds=5)
    assert any("b runs by its genai_config.json" in note and "threads=1" in note for note in document.cells[1].notes)
    assert not any("genai_config" in n for c in measured(lambda _: (50, 10), seconds=5).cells for n in c.notes)


def test_gates_devices_terminal_and_page_know_both_phases(measured):
    document = measured(noisy(np.random.default_rng(0), a=(50, 10), b=(50, 15)))
    statuses = [check.status for check in check_gates(document, max_slowdown=20).checks]
    assert statuses == ["holds", "failed"]
    faster = measured(noisy(np.random.default_rng(1), a=(50, 10), b=(50, 10)))
    against = check_gates(document, faster, max_slowdown=20).checks
    assert [check.status for check in against] == ["holds", "failed"]
    compared = compare_documents({"here": document, "there": faster})
    assert [(row.configuration, row.arm) for row in compared.timings] == [
        (phase, label) for phase in ("first token", "next token") for label in ("a", "b")
    ]
    text = io.StringIO()
    print_document(Console(file=text, width=160), document)
    for shown in (text.getvalue(), bench_page(document)):
        assert "1.50x slower" in shown
        assert "next tokens, decode" in shown


def test_a_random_prompt_has_no_special_tokens(tmp_path):
    folders = [
        folder_of(tmp_path, vocabulary=9, special=frozenset({0, 8})),
        folder_of(tmp_path, special=frozenset({3})),
    ]
    prompt = random_prompt(folders, 500, seed=0)
    assert set(prompt.tolist()) == {1, 2, 4, 5, 6, 7}
    assert prompt.dtype == np.int32
    assert (prompt == random_prompt(folders, 500, seed=0)).all()
    assert (prompt != random_prompt(folders, 500, seed=1)).any()
    with pytest.raises(UsageError, match="special"):
        random_prompt([folder_of(tmp_path, vocabulary=1, special=frozenset({0}))], 5, seed=0)


# Models of onnxruntime-genai.


@pytest.fixture(scope="session")
def generating(tmp_path_factory):
    return write_generating(tmp_path_factory.mktemp("generating"))


def bench(*words):
    return run(["bench", *map(str, words)])


@needs_genai
def test_a_run_has_every_quantity(generating, tmp_path, capsys):
    twin = changed(generating, tmp_path / "twin")
    assert bench(generating, twin, "--prompt", 20, "--generate", 8, "--seconds", 0.3, "--threads", 1, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [cell["phase"] for cell in document["cells"]] == ["first token", "next token"]
    for cell, each in zip(document["cells"], (1, 7), strict=True):
        assert {arm["n"] for arm in cell["arms"]} == {each * cell["arms"][0]["blocks"]}
        assert (cell["threads"], cell["provider"]) == (1, "CPUExecutionProvider")
        assert cell["arms"][1]["speedup_interval"][0] <= cell["arms"][1]["speedup"]
    for found, first, following in zip(document["generation"], *(c["arms"] for c in document["cells"]), strict=True):
        assert found["prefill_per_second"] == pytest.approx(20e3 / first["median_ms"])
        assert found["decode_per_second"] == pytest.approx(1e3 / following["median_ms"])
        assert first["median_ms"] > 0
    assert all(memory["peak_bytes"] > 30e6 for memory in document["memory"])
    assert [memory["stopped_in"] for memory in document["memory"]] == ["done", "done"]
    assert document["environment"]["versions"]["onnxruntime-genai"]


@needs_genai
@pytest.mark.parametrize(
    ("option", "tokens"),
    [(("--prompt", 40), (40, 64)), (("--generate", 30), (128, 30)), (("--generate", 128), (128, 128))],
)
def test_one_of_the_two_is_enough(generating, option, tokens):
    settings = BenchConfig.of({option[0][2:]: option[1]})
    request = generation_request([str(generating)], settings)
    assert (len(request.prompt), request.generate) == tokens


@needs_genai
def test_a_token_that_ends_a_text_ends_no_generation(generating, tmp_path):
    prompt = np.array([5, 6, 7], np.int32)
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(generating))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=5, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    generator.generate_next_token()
    ends = changed(generating, tmp_path / "ends", eos_token_id=int(generator.get_sequence(0)[-1]))
    assert GenaiModel.load(GenaiFolder.read(str(ends)), None).generate(prompt, 30).shape == (30,)
    with pytest.raises(ModelError, match="context_length"):
        GenaiModel.load(GenaiFolder.read(str(ends)), None).generate(prompt, CONTEXT)


@needs_genai
def test_a_prompt_of_text(generating, tmp_path):
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "short.txt").write_text(f"{WORDS[0]} {WORDS[1]}\n")
    settings = BenchConfig.of(prompt=12, data=str(text))
    ids = generation_request([str(generating)], settings).prompt
    words = text.read_text().split("\n\n")[0].split()[:11]
    assert ids.tolist() == [2, *(4 + WORDS.index(word) for word in words)]
    with pytest.raises(UsageError, match="4 tokens"):
        generation_request([str(generating)], BenchConfig.of(prompt=12, data=str(tmp_path / "short.txt")))
    fewer = changed(generating, tmp_path / "fewer", vocab_size=10)
    with pytest.raises(UsageError, match="10 tokens"):
        generation_request([str(generating), str(fewer)], settings)


@needs_genai
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", 250, "--generate", 64), str(CONTEXT)),
        (("--prompt", CONTEXT), str(CONTEXT)),
        (("--prompt", 0), "--prompt"),
        (("--generate", 1), "--generate"),
        (("--prompt", 9, "--batch", 2), "--batch"),
        (("--prompt", 9, "--provider", "cuda"), "--provider"),
        (("--prompt", 9, "--dtype", "float16"), "--dtype"),
        (("--prompt", 9, "--cold-start"), "--cold-start"),
        (("--prompt", 9, "--threads", "1,2"), "--threads"),
        (("--prompt", 9, "--max-slowdown", "5%"), "second model"),
        (("--prompt", 9, "--data", "samples/digits_eval.npz"), "text"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(generating, words, said, capsys):
    assert bench(generating, *words) == 2
    assert said in capsys.readouterr().err


@needs_genai
def test_folders_that_are_not_genais(generating, tmp_path, capsys):
    assert bench(text_models.write_folder(tmp_path / "encoder"), "--prompt", 9) == 2
    assert "genai_config.json" in capsys.readouterr().err
    assert bench(generating / "model.onnx", "--prompt", 9) == 2
    assert bench(changed(generating, tmp_path / "no_size", vocab_size=None), "--prompt", 9) == 3
    assert "vocab_size" in capsys.readouterr().err
    unknown = changed(generating, tmp_path / "unknown", type="teapot")
    assert bench(generating, unknown, "--prompt", 9, "--generate", 2, "--seconds", 0.1) == 3
    error = capsys.readouterr().err
    assert "teapot" in error  # genai's own words
    assert str(unknown) in error


def test_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert bench(tmp_path, "--prompt", 9) == 2
    assert "pip install 'rsi-deploy[genai]'" in capsys.readouterr().err


@needs_genai
def test_a_memory_limit_says_who_fits(generating, capsys):
    words = ("--prompt", 9, "--generate", 2, "--seconds", 0.1, "--json")
    assert bench(generating, *words, "--memory-limit", "20MB") == 0
    (memory,) = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"] is False


@needs_genai
def test_a_bundle_is_such_a_folder(generating, tmp_path, capsys):
    ids = np.ones((2, 8), np.int64)
    names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    caches = {name: np.zeros((2, 1, 0, 16), np.float32) for name in names}
    np.savez(tmp_path / "feeds.npz", input_ids=ids, attention_mask=np.ones_like(ids), **caches)
    words = ["--rank", "50%", "--always-split", "--no-bench", "--feeds", tmp_path / "feeds.npz"]
    assert run(["export", str(generating), *map(str, words), "-o", str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    assert bench(generating, tmp_path / "bundle", "--prompt", 9, "--generate", 3, "--seconds", 0.1, "--json") == 0
    speeds = json.loads(capsys.readouterr().out)["generation"]
    assert [found["label"].rpartition("/")[2] for found in speeds] == ["onnx", "bundle"]
    assert all(found["decode_per_second"] > 0 for found in speeds)


@needs_genai
def test_nothing_is_sent(generating, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):  # where onnxruntime-genai keeps a number of the device for its telemetry
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    code = "import sys; from rsi_deploy.cli import run; sys.exit(run(sys.argv[1:]))"
    words = ["bench", str(generating), "--prompt", "9", "--generate", "2", "--seconds", "0.1"]
    done, attempts, unrouted = blocked(tmp_path, code, *words)
    assert done.returncode == 0, done.stderr
    assert attempts == []
    assert unrouted == 0
    assert not list((tmp_path / "home").rglob("*deviceid*"))
