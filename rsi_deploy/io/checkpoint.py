"""Checkpoints as people have them, loaded without ever executing a pickle.

.safetensors                                the state dict itself
.pth .pt .th .bin .ckpt (torch.save)        bare, or under `state_dict`, `model`, `model_state_dict`, ...
keys                                        with DataParallel's `module.` or torch.compile's `_orig_mod.` prefix
"""

import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.archives import check_archive
from rsi_deploy.io.limits import first_line, shown

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.")
# BatchNorm's counter came with torch 0.4.1; older checkpoints lack it, inference never reads it.
COUNTER = "num_batches_tracked"


def load_checkpoint_(module: nn.Module, path: str | Path) -> None:
    """Load the state dict at `path` into `module`, every key and shape fitting exactly.

    Raises:
        UsageError: no such file.
        ModelError: a file that is no checkpoint, one only a full pickle could read, or keys and shapes that do not
            fit; the first few are named.
    """
    expected = module.state_dict()
    # A model may itself be wrapped (DataParallel, torch.compile): its own names win.
    names = dict(zip(_without_prefixes(expected), expected, strict=True))
    state = {names.get(key, key): value for key, value in read_state_dict(path).items()}
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    problems = [
        _listed("missing", sorted(k for k in expected.keys() - state.keys() if not k.endswith(COUNTER))),
        _listed("unexpected", sorted(state.keys() - expected.keys())),
        _listed(
            "of another shape",
            [
                f"{key} {tuple(value.shape)}, the model has {tuple(own[key].shape)}"
                for key, value in state.items()
                if key in own and own[key].shape != value.shape
            ],
        ),
    ]
    if any(problems):
        raise ModelError(
            f"checkpoint {Path(path).name} does not fit {type(module).__name__}: " + "; ".join(filter(None, problems))
        )
    module.load_state_dict(state, strict=False)  # strict by the checks above, but for the counter


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict at `path`, unwrapped and with wrapper prefixes taken off the keys."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}; expected a .safetensors or torch.save file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not _is_state_dict(content):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            f"checkpoint {path.name} holds no state dict: found {found}; expected tensors by name, bare or under "
            + ", ".join(WRAPPERS)
        )
    return _without_prefixes({str(key): value for key, value in content.items()})


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> object:
    if not _is_torch_save(path):
        raise ModelError(f"{path.name} is not a torch.save file, or only the beginning of one: save or copy it again")
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ModelError(
            f"{path.name} can only be read by executing its pickle, which is refused: it holds "
            f"{shown(found[1]) if found else 'more than tensors'}. Where you trust it, on a machine that you would "
            f"lend to whoever made it, convert it once: {conversion_command(path)}"
        ) from error
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise ModelError(f"{path.name} is not a readable torch.save file: {first_line(error)}") from error


def conversion_command(path: Path) -> str:
    """The shell command that turns a full pickle at `path` into safetensors beside it. It executes the pickle."""
    script = (
        "import sys, torch, safetensors.torch as st; "
        'm = torch.load(sys.argv[1], map_location="cpu", weights_only=False); '
        f"m = next((m[k] for k in {json.dumps(WRAPPERS)} if k in m), m) if isinstance(m, dict) else m; "
        's = getattr(m, "state_dict", lambda: m)(); '
        "st.save_file({k: v.detach().contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    return shlex.join(["python", "-c", script, str(path), str(path.with_suffix(".state.safetensors"))])


def _is_torch_save(path: Path) -> bool:
    """A zip archive, or (before torch 1.6) a pickle that opens with a magic number."""
    with path.open("rb") as file:
        head = file.read(32)
    return zipfile.is_zipfile(path) or torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in head


def _is_state_dict(content: Mapping[object, object]) -> bool:
    """Tensors with numbers in them: neither quantized nor sparse, nor without storage."""
    return bool(content) and all(
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        for value in content.values()
    )


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefixes({key.removeprefix(prefix): value for key, value in state.items()})
    return dict(state)


def _listed(what: str, names: list[str], *, show: int = 5) -> str:
    if not names:
        return ""
    more = f", and {len(names) - show} more" if len(names) > show else ""
    return f"{len(names)} {what}: {', '.join(names[:show])}{more}"
