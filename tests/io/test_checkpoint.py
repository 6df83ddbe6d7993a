import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.checkpoint import WRAPPERS, conversion_command, load_checkpoint_, read_state_dict


def make_model(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.fixture
def trained():
    return make_model(1)


def assert_loads(path, trained, model=None):
    model = model or make_model(2)
    load_checkpoint_(model, path)
    found, expected = model.state_dict(), trained.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    assert not torch.equal(make_model(2)[0].weight, trained[0].weight)  # the comparison can fail


class WritesAFile:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# -- what can be read


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_bare_state_dict(tmp_path, trained, suffix, new_format):
    path = tmp_path / f"model{suffix}"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=new_format)
    assert_loads(path, trained)
    assert_loads(str(path), trained)


def test_safetensors(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", trained)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_under_a_wrapper_beside_other_things(tmp_path, trained, wrapper):
    path = tmp_path / "model.pth"
    torch.save({"epoch": 3, wrapper: trained.state_dict(), "best": 0.9, "args": {"lr": 0.1}}, path)
    assert_loads(path, trained)
    torch.save({"outer": 1, "model": {wrapper: trained.state_dict(), "step": 5}}, path)
    assert_loads(path, trained)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("safe", [True, False])
def test_prefixes(tmp_path, trained, prefix, safe):
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    path = tmp_path / ("model.safetensors" if safe else "model.pth")
    (save_file if safe else torch.save)(state, path)
    assert_loads(path, trained)
    assert set(read_state_dict(path)) == set(trained.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_model_that_is_itself_wrapped(tmp_path, trained, prefix):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = make_model(2)

    path = tmp_path / "model.pth"
    torch.save({prefix + key: value for key, value in trained.state_dict().items()}, path)
    assert_loads(path, trained, Wrapped())


def test_a_prefix_on_some_keys_is_a_name(tmp_path):
    torch.save({"module.weight": torch.zeros(2), "bias": torch.zeros(2)}, tmp_path / "a.pth")
    assert set(read_state_dict(tmp_path / "a.pth")) == {"module.weight", "bias"}


def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    source, target = Tied(), Tied()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_checkpoint_(target, tmp_path / "a.pth")
    assert torch.equal(target.b.weight, source.a.weight)
    assert target.b.weight is target.a.weight


def test_a_model_without_parameters_takes_no_checkpoint(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match="unexpected"):
        load_checkpoint_(nn.ReLU(), tmp_path / "a.pth")


# -- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("2.weight"), "1 missing: 2.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(1)}), "1 unexpected: fc.weight"),
        (lambda s: s.update({"2.weight": torch.zeros(5, 3)}), r"1 with another shape: 2.weight \(5, 3\), .* \(2, 3\)"),
        (
            lambda s: s.update({f"x{i}": torch.zeros(1) for i in range(8)}),
            "8 unexpected: x0, x1, x2, x3, x4, and 3 more",
        ),
        (lambda s: s.update({"a": s.pop("2.bias")}), "1 missing: 2.bias; 1 unexpected: a"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named_and_change_nothing(tmp_path, trained, change, message):
    state = dict(trained.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pth")
    model = make_model(2)
    with pytest.raises(ModelError, match=rf"checkpoint other\.pth does not fit Sequential: .*{message}"):
        load_checkpoint_(model, tmp_path / "other.pth")
    assert torch.equal(model[0].weight, make_model(2)[0].weight)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "found"),
        ({"epoch": 3, "lr": 0.1}, "found epoch, lr"),
        ([1, 2], "found list"),
        (torch.zeros(3), "found Tensor"),
    ],
    ids=["empty", "numbers", "list", "tensor"],
)
def test_content_without_a_state_dict(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=rf"checkpoint a\.pth has no state dict: {found}.*expected tensors by name"):
        read_state_dict(tmp_path / "a.pth")


# -- what cannot be read


def damaged(directory):
    torch.save({"a": torch.randn(1000)}, directory / "whole.pth")
    whole = (directory / "whole.pth").read_bytes()
    torch.save({"a": torch.randn(1000)}, directory / "old.pth", _use_new_zipfile_serialization=False)
    old = (directory / "old.pth").read_bytes()
    save_file({"a": torch.randn(1000)}, directory / "whole.safetensors")
    safe = (directory / "whole.safetensors").read_bytes()
    return {
        "empty.pth": b"",
        "text.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "page.pth": b"<!DOCTYPE html><html><body>404</body></html>",
        "pickle.pth": pickle.dumps({"a": 1}),
        "half.pth": whole[: len(whole) // 2],
        "nearly.pth": whole[:-30],
        "old half.pth": old[: len(old) // 2],
        "old start.pth": old[:30],
        "changed.pth": whole.replace(b"data.pkl", b"atad.pkl"),
        "empty.safetensors": b"",
        "half.safetensors": safe[: len(safe) // 2],
        "text.safetensors": b"hello " * 100,
        **{f"random {i}.pth": bytes([i]) + os.urandom(300) for i in (0, 46, 80, 81, 97, 113, 128, 133, 255)},
        **{f"random {i}.safetensors": os.urandom(300) for i in range(3)},
    }


def test_damaged_files_are_model_errors_with_their_names(tmp_path):
    for name, content in damaged(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            read_state_dict(path)
        assert name in str(caught.value), name
        assert "executing" not in str(caught.value), name  # nobody should execute these


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(UsageError, match=r"no checkpoint at .*; expected a \.safetensors or torch\.save"):
            read_state_dict(path)


# -- what would have to be executed


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_full_pickle_is_refused_and_not_executed(tmp_path, trained, suffix, new_format):
    trace, path = tmp_path / "executed", tmp_path / f"full{suffix}"
    content = {"state_dict": trained.state_dict(), "extra": WritesAFile(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelError, match=r"can only be read by executing its pickle, which is refused") as e:
        read_state_dict(path)
    assert conversion_command(path) in str(e.value)
    assert "\x1b" not in str(e.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap works


def test_a_pickle_that_is_not_a_torch_file_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(WritesAFile(trace)))
    with pytest.raises(ModelError, match=r"a\.pth is not a torch\.save file"):
        read_state_dict(tmp_path / "a.pth")
    assert not trace.exists()


class Settings:
    """What training scripts keep in their checkpoints."""


@pytest.mark.parametrize(
    "content",
    [
        lambda model: model,
        lambda model: {"model": model, "epoch": 3},
        lambda model: {"state_dict": model.state_dict(), "args": Settings()},
        lambda model: {"module." + key: value for key, value in model.state_dict().items()} | {"hook": len},
    ],
    ids=["module", "wrapped module", "state dict beside settings", "tensors beside a function"],
)
def test_the_printed_command_converts_it(tmp_path, trained, content):
    path = tmp_path / "it's a full one.pth"
    torch.save(content(trained), path)
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    command = str(caught.value).partition("to convert it: ")[2]
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    converted = tmp_path / "it's a full one.state.safetensors"
    assert_loads(converted, trained)


def test_a_batch_norm_counter_may_be_missing_and_nothing_else(tmp_path, trained):
    state = trained.state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    assert_loads(tmp_path / "old.pth", trained, make_model(2))
    del state["1.running_mean"]
    torch.save(state, tmp_path / "older.pth")
    with pytest.raises(ModelError, match=r"1 missing: 1\.running_mean"):
        load_checkpoint_(make_model(2), tmp_path / "older.pth")


def test_tensors_that_have_no_numbers_of_their_own(tmp_path):
    tensors = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, 3, device="meta"),
    }
    for tensor in tensors.values():
        torch.save({"0.weight": tensor}, tmp_path / "a.pth")
        with pytest.raises(ModelError, match=r"a\.pth"):
            read_state_dict(tmp_path / "a.pth")
    torch.save({"0.weight": torch.eye(3)}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")


def test_a_torch_file_that_unpacks_to_far_more(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pth") as stored, packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    monkeypatch.setattr("rsi_deploy.io.archives.UNPACKED_BYTES", 1 << 20)
    assert read_state_dict(tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"b\.pth is not a readable torch\.save file: its \d+ bytes would unpack to"):
        read_state_dict(tmp_path / "b.pth")
