"""OpenAI's completions by the real server: tiny random Llamas against onnxruntime-genai in this process."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import time

import pytest
from generating_models import CONTEXT, changed, needs_genai, write_generating
from served import Server, linear, run_threads

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.packaging.packing import package
from rsi_deploy.serving.bundles import open_bundle
from rsi_deploy.serving.catalog import read_catalog
from rsi_deploy.serving.engine.batches import Batcher, BatchLimits
from rsi_deploy.serving.engine.pool import Pool
from rsi_deploy.serving.engine.queues import Cost
from rsi_deploy.serving.language.decoder import Decoder
from rsi_deploy.serving.language.generation import PendingText, StopSearch, TextRequest
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.ray.app import read_settings
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports.common import Record
from rsi_deploy.serving.transports.openai_answers import EventStream

pytestmark = needs_genai

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "the quick brown"


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_generating(tmp_path_factory.mktemp("llama"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    arguments = (f"llama={llama}", f"m={linear(folder / 'm.onnx')}", "--workers", "1", "--max-tokens", "200")
    with Server(*arguments, "--max-json", "100kB", log=folder / "log", ports=(0, None)) as running:
        yield running


def greedy(folder, prompt, count):
    """Return the text and the number of tokens of onnxruntime-genai alone, generated greedily."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    stream, text = tokenizer.create_stream(), ""
    while not generator.is_done():
        generator.generate_next_token()
        text += stream.decode(generator.get_next_tokens()[0])
    return text, len(ids), len(generator.get_sequence(0)) - len(ids)


def post(server, path, **body):
    """Return the status and the document of one request."""
    status, headers, answer = server.ask("POST", path, json.dumps({"model": "llama", **body}).encode())
    assert headers["content-type"] == "application/json"
    return status, json.loads(answer)


def completed(server, prompt=PROMPT, **body):
    """Return text, reason and usage of a completion."""
    body = {"max_tokens": 30, "temperature": 0, **body}
    status, answer = post(server, "/v1/completions", prompt=prompt, **body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return choice["text"], choice["finish_reason"], answer["usage"]


def streamed(server, path, **body):
    """Return the documents of a stream, which must end as OpenAI's."""
    body = {"model": "llama", "stream": True, **body}
    status, headers, answer = server.ask("POST", path, json.dumps(body).encode())
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer
    events = answer.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("prompt", [PROMPT, "ä 日本", [100, 7, 260]])
def test_greedy_text_is_that_of_genai(server, llama, prompt):
    text, before, count = greedy(llama, prompt, 30)
    found, reason, usage = completed(server, prompt)
    assert (found, reason) == (text, "length")
    assert usage == {"prompt_tokens": before, "completion_tokens": count, "total_tokens": before + count}
    assert completed(server, [prompt])[0] == text
    assert completed(server, "lazy dogs")[0] != text


def test_streams_equal_whole_answers(server):
    text, reason, usage = completed(server)
    documents = streamed(
        server,
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=30,
        temperature=0,
        stream_options={"include_usage": True},
    )
    *chunks, last = documents
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, reason]
    assert len(chunks) > 10
    assert (last["choices"], last["usage"]) == ([], usage)
    assert len({document["id"] for document in documents}) == 1


def test_chat_goes_through_the_template(server, llama):
    messages = [{"role": "system", "content": "fox"}, {"role": "user", "content": [{"type": "text", "text": "dog"}]}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 20}
    text, before, _ = greedy(llama, "<system>fox<user>dog<assistant>", 20)
    status, answer = post(server, "/v1/chat/completions", **body)
    assert status == 200, answer
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("chat.completion", before)
    first, *chunks = streamed(server, "/v1/chat/completions", **body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert (first["object"], chunks[-1]["choices"][0]["finish_reason"]) == ("chat.completion.chunk", "length")


def test_stop_strings_end_the_text(server):
    text, _, usage = completed(server)
    stop = text[8:11]
    cut = text[: text.index(stop)]
    for given in (stop, ["not there", stop]):
        found, reason, fewer = completed(server, stop=given)
        assert (found, reason) == (cut, "stop")
        assert fewer["completion_tokens"] < usage["completion_tokens"]
    chunks = streamed(server, "/v1/completions", prompt=PROMPT, max_tokens=30, temperature=0, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    # What only begins a stop string at the end of the text is part of the answer.
    assert completed(server, stop=f"{text[-2:]}never")[:2] == (text, "length")


def test_text_held_back_is_not_lost():
    search = StopSearch(("abab", "xyz"))
    parts = [search.add(letter) for letter in "ababac"[:3]]
    assert parts == [("", False)] * 3
    assert search.add("c") == ("abac", False)
    assert search.add("xy") == ("", False)
    assert search.held == "xy"
    assert search.add("zab") == ("", True)


def test_sampling_follows_the_seed(server, llama):
    sampled = {"temperature": 1.5, "seed": 7}
    text = completed(server, **sampled)[0]
    assert completed(server, **sampled)[0] == text
    assert completed(server, **{**sampled, "seed": 8})[0] != text
    assert completed(server, **sampled, top_k=1)[0] == greedy(llama, PROMPT, 30)[0]
    assert completed(server, **sampled, top_p=1e-6)[0] == greedy(llama, PROMPT, 30)[0]


def test_the_end_of_a_text_is_no_text(llama, tmp_path):
    """The third token of the greedy answer becomes the one that ends texts."""
    decoder = Decoder(open_bundle(llama))
    request = TextRequest(prompt=PROMPT, temperature=0, max_tokens=30)
    pieces = list(decoder.generate(request))
    ids = [int(token) for token in decoder._tokenizer.encode(PROMPT)]
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(decoder._model)
    parameters.set_search_options(max_length=len(ids) + 3, do_sample=False)
    generator = genai.Generator(decoder._model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    token = int(generator.get_sequence(0)[-1])
    ending = list(Decoder(open_bundle(changed(llama, tmp_path / "ends", eos_token_id=token))).generate(request))
    assert 1 <= len(ending) <= 3
    assert (ending[-1].finish, ending[-1].tokens) == ("stop", len(ending))
    assert "".join(piece.text for piece in ending) == "".join(piece.text for piece in pieces[: len(ending) - 1])


def test_lengths_are_bounded(server):
    assert completed(server, max_tokens=5000)[2]["completion_tokens"] == 200  # --max-tokens
    assert completed(server, [5] * (CONTEXT - 10), max_tokens=100)[2]["completion_tokens"] == 10
    assert completed(server, max_tokens=None)[2]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 404, "other"),
        ({"model": "llama:7"}, 404, "7"),
        ({"model": "m"}, 400, "genai_config.json"),
        ({"model": None}, 400, "model"),
        ({"prompt": ["a", "b"]}, 400, "2 prompts"),
        ({"prompt": [[1], [2]]}, 400, "2 prompts"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"prompt": [1 << 63]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [5000]}, 400, "5000"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": "a\0b"}, 400, "NUL"),
        ({"prompt": [5] * CONTEXT}, 400, str(CONTEXT)),
        ({"prompt": "x" * 200_000}, 413, "bytes"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_k": -1}, 400, "top_k"),
        ({"seed": 0.5}, 400, "seed"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"n": 2}, 400, "n = 2"),
        ({"echo": True}, 400, "echo"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"temprature": 0}, 400, "temprature"),
    ],
)
def test_bad_requests(server, body, status, words):
    found, answer = post(server, "/v1/completions", **{"prompt": "a", "max_tokens": 2, **body})
    assert (found, list(answer)) == (status, ["error"]), answer
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    found, _, stream = server.ask(
        "POST", "/v1/completions", json.dumps({"model": "llama", "prompt": "a", "stream": True, **body})
    )
    assert found == status or "stream" in body, stream
    assert completed(server, n=1, echo=False, presence_penalty=0, logprobs=None, user="me")[1] == "length"


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", [{"role": "robot", "content": "a"}], [{"role": "user", "content": [{"type": "image_url"}]}], [1]],
)
def test_bad_messages(server, messages):
    status, answer = post(server, "/v1/chat/completions", messages=messages)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "message" in answer["error"]["message"]


def test_other_paths_and_protocols(server):
    for raw in (b"{", b"[]", b'{"model": "\\ud800"}'):
        status, _, answer = server.ask("POST", "/v1/completions", raw)
        assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/v1/nothing", 404)):
        found, _, answer = server.ask(method, path)
        assert (found, "message" in json.loads(answer)["error"]) == (status, True)
    assert [model["id"] for model in json.loads(server.ask("GET", "/v1/models")[2])["data"]] == ["llama"]
    assert json.loads(server.ask("GET", "/v1/models/llama")[2])["id"] == "llama"
    for method, path in (("GET", "/v2/models/llama"), ("POST", "/v2/models/llama/infer")):
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
        status, _, answer = server.ask(method, path, json.dumps({"inputs": [tensor]}))
        assert (status, "/v1/completions" in json.loads(answer)["error"]) == (400, True)


def test_a_folder_without_a_template(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    decoder = Decoder(open_bundle(tmp_path / "plain"))
    assert list(decoder.generate(TextRequest(prompt="a", max_tokens=2)))[-1].finish
    with pytest.raises(ModelError, match="/v1/completions"):
        next(decoder.generate(TextRequest(messages='[{"role": "user", "content": "a"}]')))


@contextlib.contextmanager
def stopped(server):
    """Stop the worker, so that an answer takes as long as the test wants."""
    (pid,) = server.info["workers"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_noted_at_once(server, stream):
    status = "499"
    before = server.metric("rsi_requests_total", status=status)

    def answers():
        return server.metric("rsi_requests_total", status="499") + server.metric("rsi_requests_total", model="llama")

    connection = http.client.HTTPConnection(server.http, timeout=30)
    sent = {"model": "llama", "prompt": PROMPT, "max_tokens": 200, "stream": stream}
    if not stream:
        with stopped(server):
            connection.request("POST", "/v1/completions", json.dumps(sent))
            connection.close()
            until(lambda: server.metric("rsi_requests_total", status=status) == before + 1)
    else:
        for _ in range(50):  # a short text may be complete before the worker is stopped
            done = answers()
            connection.request("POST", "/v1/completions", json.dumps(sent))
            response = connection.getresponse()
            with stopped(server):
                response.close()
                connection.close()
                until(lambda done=done: answers() > done)
            if server.metric("rsi_requests_total", status=status) == before + 1:
                break
        assert server.metric("rsi_requests_total", status=status) == before + 1
    assert completed(server, max_tokens=3)[1] == "length"


def test_a_stop_reaches_the_worker_and_a_death_the_client(llama):
    """The event loop runs in this process, so nothing happens between two awaits."""

    async def run():
        service = Service(read_catalog([f"m={llama}"]), BatchLimits(), workers=1, threads=1, provider="cpu")
        await service.start()
        try:
            served, ends = service.generator("m", ""), []
            request = TextRequest(prompt=PROMPT, temperature=0, max_tokens=100)
            (worker,) = service._pool.active
            generate, wanted = worker.generate, []

            async def counted(key, request, on_piece, timeout):
                return await generate(key, request, lambda piece: wanted.append(on_piece(piece)) or wanted[-1], timeout)

            worker.generate = counted
            gone = service.generate(served, request, ends.append)
            first = await anext(gone)
            await gone.aclose()
            while worker.busy:
                await asyncio.sleep(0.005)
            assert (first.tokens, wanted[-1], len(wanted) < 10, ends) == (1, False, True, [])

            cut = service.generate(served, request, ends.append)
            await anext(cut)
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(Refusal, match="died while it generated") as refused:
                [piece async for piece in cut]
            assert refused.value.status == 503

            pieces = [piece async for piece in service.generate(served, request, ends.append)]
            assert "".join(piece.text for piece in pieces) == greedy(llama, PROMPT, 100)[0]
            assert (len(ends), service._pool.restarts) == (1, 1)
        finally:
            await service.close()

    asyncio.run(run())


@pytest.mark.parametrize(("seconds", "status"), [(0.0, 503), (100.0, 429)])
def test_who_would_wait_too_long_is_refused(seconds, status):
    async def run():
        batcher = Batcher(BatchLimits(generation_wait=0.1, latency_bound=50.0), lambda *_: None)
        batcher.pool = Pool(1, "cpu", 1, batcher.pump)  # its worker is never started
        batcher._costs["m"] = Cost(mean=seconds, batches=1)

        def ask():
            generation = PendingText(request=TextRequest(prompt="a"), on_piece=print)
            return asyncio.create_task(batcher.run("m", {}, alone=True, generation=generation))

        first, second = ask(), ask()
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert [error.status for error in found] == [503, status]
        assert all("0.1 s" in error.message for error in found)

    asyncio.run(run())


def test_an_error_in_a_stream_is_an_event():
    async def events():
        yield b"data: {}\n\n"
        raise Refusal(503, "the worker died")

    async def pieces():
        yield None

    async def run():
        sent, notes = [], []
        record = Record(protocol="http", method="POST /v1/completions", client="")

        async def send(message):
            sent.append(message.get("body", b""))

        async def receive():
            await asyncio.sleep(60)

        await EventStream(events(), pieces(), record, notes.append)({"type": "http"}, receive, send)
        return b"".join(sent), notes

    text, (record,) = asyncio.run(run())
    first, last, _ = text.decode().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert (record.status, record.error) == (503, "the worker died")


def test_two_clients_get_their_own_answers(server, llama):
    prompts = ["the lazy", "dogs jump"]
    want = [greedy(llama, prompt, 60)[0] for prompt in prompts]

    def client(number):
        return [completed(server, prompts[number], max_tokens=60)[0] for _ in range(3)]

    found = run_threads(2, client)
    assert found == [[want[0]] * 3, [want[1]] * 3]
    assert want[0] != want[1]


def test_metrics_and_log_count_tokens(server):
    def counts():
        names = ("rsi_prompt_tokens_total", "rsi_generated_tokens_total", "rsi_first_token_seconds_count")
        return [server.metric(name, model="llama", version="1") for name in names]

    before = counts()
    _, _, usage = completed(server)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [usage["prompt_tokens"], 30, 1]
    done = server.metric("rsi_requests_total", model="llama", status="200")
    streamed(server, "/v1/completions", prompt=PROMPT)
    until(lambda: server.metric("rsi_requests_total", model="llama", status="200") == done + 1)
    line = [json.loads(line) for line in server.errors().splitlines() if "/v1/completions" in line][-1]
    assert (line["model"], line["status"], line["batch_rows"]) == ("llama", 200, 1)


def test_what_is_not_offered_for_decoders(llama, tmp_path):
    with pytest.raises(UsageError, match="--shadow"):
        read_catalog([f"m={llama}"], shadow=str(llama))
    with pytest.raises(UsageError, match="--engine ray"):
        read_settings({"models": (str(llama),)}).catalog()
    for target in ("triton", "kserve", "ray-serve"):
        with pytest.raises(UsageError, match=r"/v1/completions"):
            package(llama, tmp_path / "out", target=target)
    decoder = json.loads((llama / "genai_config.json").read_text())["model"]["decoder"]
    decoder["session_options"]["provider_options"] = [{"cuda": {}}]
    with pytest.raises(ModelError, match="--provider cuda"):
        Decoder(open_bundle(changed(llama, tmp_path / "cuda", decoder=decoder)))


def test_without_the_package_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UsageError, match=r"rsi-deploy\[genai\]"):
        Decoder(open_bundle(llama))
