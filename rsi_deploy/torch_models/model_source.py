"""Load the MODEL of the command line as a `Source`.

torchvision:NAME             with --weights DEFAULT | none | FILE
package.module:factory       with --checkpoint FILE; the factory is executed, so it must be trusted code
model.pt2                    a torch.export program
model.onnx                   an ONNX file
FOLDER                       the folder of a model; see `rsi_deploy.io.model_folder`
"""

import contextlib
import difflib
import http.client
import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.checkpoint import load_checkpoint_
from rsi_deploy.io.folders.conversion import onnx_folder
from rsi_deploy.io.model_folder import find_model
from rsi_deploy.io.programs import read_program
from rsi_deploy.linalg.solver import stream_seed
from rsi_deploy.runtime.feeds.shapes import parse_shape, refuse_nameless
from rsi_deploy.torch_models.computed_weights import folded


@dataclass(kw_only=True)
class Source:
    """A loaded model and its example inputs.

    Exactly one of `module`, `program` and `onnx` is set. `example_inputs` have a batch of 2, because exporters take a
    batch of 1 for a constant; those of a program are the ones that it was exported with. `folder` is the folder that
    MODEL is, whose other files go along into a bundle.
    """

    name: str
    module: nn.Module | None = None
    program: "torch.export.ExportedProgram | None" = None
    onnx: Path | None = None
    folder: Path | None = None
    example_inputs: tuple[Any, ...] = ()
    preprocessing: Preprocessing | None = None
    notes: list[str] = field(default_factory=list)


def load_source(
    model: str,
    *,
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | tuple[int, ...] | None = None,
    seed: int = 0,
) -> Source:
    """Load MODEL; the module docstring lists its forms.

    Args:
        model: MODEL of the command line.
        weights: weights of a torchvision model: "DEFAULT" downloads them, "none" initializes at random, else a file.
        checkpoint: state dict for the module of a factory.
        input_shape: shape such as `1x3x32x32`, for a model that does not declare one. The batch stays dynamic.
        seed: random seed for the initialization and the example inputs.

    Raises:
        UsageError: an unknown model, factory or file, or options that do not apply to this form.
        ModelError: a checkpoint that does not fit, or a factory that fails.
    """
    shape = _torch_shape(input_shape)
    if model.startswith("torchvision:"):
        source = _torchvision(model.removeprefix("torchvision:"), weights, checkpoint, shape, seed)
    elif model and Path(model).is_dir():
        folder = onnx_folder(Path(model))
        path = find_model(folder)
        refuse_nameless(input_shape, path)
        source = Source(name=Path(model).resolve().name, onnx=path, folder=folder)
    elif model.endswith(".pt2"):
        source = _pt2(_existing(model))
        if shape is not None:
            raise UsageError(f"--input-shape: {model} has the shapes it was exported with; leave out --input-shape")
    elif model.endswith(".onnx"):
        path = _existing(model)
        refuse_nameless(input_shape, path)
        source = Source(name=path.name, onnx=path)
    elif ":" in model and not Path(model).exists():
        source = _factory(model, checkpoint, shape, seed)
    else:
        raise UsageError(
            f"MODEL {model!r} is none of torchvision:NAME, package.module:factory, FILE.pt2, FILE.onnx, FOLDER"
            + ("" if Path(model).exists() else " (and no such file exists)")
        )
    if source.module is None and checkpoint is not None:
        raise UsageError(f"--checkpoint goes with a factory (package.module:factory), not with {model}")
    if weights != "DEFAULT" and not model.startswith("torchvision:"):
        raise UsageError(f"--weights goes with torchvision:NAME, not with {model}; a factory takes --checkpoint")
    if source.module is not None:
        source.module = folded(source.module)
    return source


def source_of_module(module: nn.Module, input_shape: str | tuple[int, ...] | None = None, seed: int = 0) -> Source:
    """Return the `Source` of a torch module, which declares its inputs as the module of a factory does."""
    module = module.eval()
    name = type(module).__name__
    source = Source(name=name, module=folded(module), preprocessing=_declared_preprocessing(module))
    source.example_inputs = _declared_inputs(module, name, _torch_shape(input_shape), seed)
    return source


def _torch_shape(text: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Parse the shape of a single input; the first size is the batch."""
    shape = parse_shape(text)
    if shape is not None and not shape[0]:
        raise UsageError(f"--input-shape: the batch comes first and must be 1 or more, but got {text!r}")
    return shape


def _torchvision(
    name: str, weights: str, checkpoint: str | Path | None, shape: tuple[int, ...] | None, seed: int
) -> Source:
    import torchvision

    if checkpoint is not None:
        raise UsageError(f"torchvision:{name} takes its checkpoint as --weights FILE, not --checkpoint")
    known = torchvision.models.list_models(module=torchvision.models)  # the classifiers
    if name not in known:
        if name in torchvision.models.list_models():
            raise UsageError(
                f"torchvision:{name} is no image classifier; write a factory for it: package.module:factory"
            )
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none is near"
        raise UsageError(f"torchvision has no model {name!r}; near names: {near}")
    if shape is not None and len(shape) != 4:
        raise UsageError(f"torchvision:{name} takes images: --input-shape such as 1x3x224x224, but got {shape}")
    presets = torchvision.models.get_model_weights(name)
    named = weights in presets.__members__
    preset = presets[weights] if named else presets.DEFAULT
    # The initialization has its own generator, so that the global seed of the user is not changed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initialization"))
        module = torchvision.models.get_model(name, weights=None)
    if weights.lower() not in ("none", "default") and not named:
        if not Path(weights).is_file():
            listed = ", ".join(presets.__members__)
            raise UsageError(
                f"--weights {weights!r} is no file, and none of DEFAULT, none, {listed}; type one of these"
            )
        load_checkpoint_(module, weights)
    elif weights.lower() != "none":
        try:
            module.load_state_dict(preset.get_state_dict(progress=False, check_hash=True))
        except (
            OSError,
            RuntimeError,
            http.client.HTTPException,
        ) as error:  # no network, a wrong hash, a lost connection
            raise ModelError(
                f"the weights of torchvision:{name} cannot be downloaded ({error}); fetch {preset.url} by hand and "
                f"pass --weights FILE, or --weights none for random ones"
            ) from error
    preprocessing = Preprocessing.from_torchvision(preset.transforms())
    height, width = preprocessing.crop or (224, 224)
    source = Source(name=f"torchvision:{name}", module=module.eval(), preprocessing=preprocessing)
    source.example_inputs = (_example((2, *(shape or (1, 3, height, width))[1:]), seed),)
    if weights.lower() == "none":
        source.notes.append("the weights are random (--weights none): accuracy means nothing, speed and size do")
    return source


def _factory(spec: str, checkpoint: str | Path | None, shape: tuple[int, ...] | None, seed: int) -> Source:
    module_name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if not module_name or module_name.startswith(".") or not attribute:
        raise UsageError(f"MODEL {spec!r}: a factory is spelled package.module:factory")
    try:
        namespace = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"cannot import {module_name!r} of MODEL {spec!r}: {error}; type a module that python finds from here"
        ) from error
    except Exception as error:  # the user's own code runs on import
        raise ModelError(
            f"importing {module_name!r} failed: {type(error).__name__}: {error}; repair the module"
        ) from error
    factory = getattr(namespace, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(namespace), n=3, cutoff=0.4)
        raise UsageError(
            f"{module_name} has no factory {attribute!r}"
            + (f"; near names: {', '.join(near)}" * bool(near))
            + "; type one that is there"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "initialization"))
            module = factory()
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"the factory {spec} failed: {type(error).__name__}: {error}; repair the factory") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"the factory {spec} must return a torch.nn.Module, but returned {type(module).__name__}")
    source = Source(name=spec, module=module.eval())
    if checkpoint is not None:
        load_checkpoint_(module, checkpoint)
    else:
        source.notes.append("no --checkpoint: the weights are those the factory made")
    source.preprocessing = _declared_preprocessing(module)
    source.example_inputs = _declared_inputs(module, spec, shape, seed)
    return source


def _declared_preprocessing(module: nn.Module) -> Preprocessing | None:
    declared = getattr(module, "preprocessing", None)
    try:
        return (
            declared
            if declared is None or isinstance(declared, Preprocessing)
            else Preprocessing.model_validate(declared)
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"{type(module).__name__}.preprocessing: {where}: {first['msg']}"
            f"; repair that attribute, or give --mean and --std"
        ) from error


def _declared_inputs(module: nn.Module, spec: str, shape: tuple[int, ...] | None, seed: int) -> tuple[Any, ...]:
    """Return example inputs from --input-shape, or from the module's `example_inputs` or `input_shape`."""
    if shape is None and (inputs := getattr(module, "example_inputs", None)) is not None:
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    shape = shape or parse_shape(getattr(module, "input_shape", None))
    if shape is None:
        raise UsageError(f"{spec} declares no input shape: add --input-shape, such as --input-shape 1x3x224x224")
    return (_example((2, *shape[1:]), seed),)


def _pt2(path: Path) -> Source:
    with no_torch_logs():
        program = read_program(path)
    if program.example_inputs is None:
        raise ModelError(
            f"{path.name} carries no example inputs; export it again with torch.export.export(model, inputs)"
        )
    args, kwargs = program.example_inputs
    if kwargs:
        raise ModelError(f"{path.name} takes keyword inputs ({', '.join(kwargs)}); export it with positional ones")
    return Source(name=path.name, program=program, example_inputs=tuple(args))


@contextlib.contextmanager
def no_torch_logs() -> Iterator[None]:
    """Silence torch's loggers, which repeat raised errors as tracebacks and warn about deprecations inside torch."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise UsageError(f"no such file: {path}; expected an existing FILE.pt2 or FILE.onnx")
    return Path(path)


def _example(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(seed, "example"))
    return torch.randn(*shape, generator=generator)
