"""Load checkpoints without executing a pickle.

.safetensors                                a state dict
.pth .pt .th .bin .ckpt (torch.save)        a state dict, alone or under `state_dict`, `model`, `model_state_dict`, ...
keys                                        prefixes `module.` (DataParallel) and `_orig_mod.` (torch.compile) allowed
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
from rsi_deploy.io.limits import first_line, quoted_name

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.")
# BatchNorm's counter exists since torch 0.4.1; older checkpoints lack it, and inference never reads it.
COUNTER = "num_batches_tracked"


def load_checkpoint_(module: nn.Module, path: str | Path) -> None:
    """Load the state dict at `path` into `module`; all keys and shapes must match.

    Raises:
        UsageError: The file does not exist.
        ModelError: The file is not a checkpoint, can only be read by executing a pickle, or has keys or shapes that
            do not match; the message names the first few.
    """
    expected = module.state_dict()
    # If the module itself is wrapped (DataParallel, torch.compile), its prefixed names are used.
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
            "with another shape",
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
    module.load_state_dict(state, strict=False)  # the checks above are strict, except for the counter


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict at `path` without wrappers and key prefixes."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}", hint="expected a .safetensors or torch.save file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not _is_state_dict(content):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            f"checkpoint {path.name} has no state dict: found {found}; expected tensors by name, bare or under "
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
        raise ModelError(f"{path.name} is not a torch.save file, or it is cut off: save or copy it again")
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ModelError(
            f"{path.name} can only be read by executing its pickle, which is refused: it contains "
            f"{quoted_name(found[1]) if found else 'more than tensors'}. If you trust its author, run this on a "
            f"machine where it can do no harm, to convert it: {conversion_command(path)}"
        ) from error
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise ModelError(f"{path.name} is not a readable torch.save file: {first_line(error)}") from error


def conversion_command(path: Path) -> str:
    """Return the shell command that converts the pickle at `path` to safetensors; the command executes the pickle."""
    script = (
        "import sys, torch, safetensors.torch as st; "
        'm = torch.load(sys.argv[1], map_location="cpu", weights_only=False); '
        f"m = next((m[k] for k in {json.dumps(WRAPPERS)} if k in m), m) if isinstance(m, dict) else m; "
        's = getattr(m, "state_dict", lambda: m)(); '
        "st.save_file({k: v.detach().contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    return shlex.join(["python", "-c", script, str(path), str(path.with_suffix(".state.safetensors"))])


def _is_torch_save(path: Path) -> bool:
    """Return whether the file is a zip archive or, before torch 1.6, a pickle that starts with the magic number."""
    with path.open("rb") as file:
        head = file.read(32)
    return zipfile.is_zipfile(path) or torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in head


def _is_state_dict(content: Mapping[object, object]) -> bool:
    """Return whether all values are dense CPU tensors, neither quantized nor sparse."""
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
