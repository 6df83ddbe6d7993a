"""The request of `bench --prompt --generate`: folders of onnxruntime-genai and one prompt for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from rsi_deploy.benchmark.generation.genai import GenaiFolder, Prompt, genai_library
from rsi_deploy.benchmark.settings import GENERATE, PROMPT, BenchConfig
from rsi_deploy.benchmark.variants import short_names
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import flag_of
from rsi_deploy.data.text_data import TextOptions, is_text
from rsi_deploy.data.text_files import COLUMN, read_texts
from rsi_deploy.data.tokenizer import FolderTokenizer
from rsi_deploy.runtime.pinning import parse_cores

TAKEN = {
    *("prompt", "generate", "threads", "pin", "seed", "seconds", "budget", "precision", "data", "column"),
    *("memory", "memory_limit", "baseline", "max_slowdown"),
}
"""The settings of `bench` that have a meaning here."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One measurement of models that generate text.

    Attributes:
        folders: folders of the models; the others are compared with the first.
        labels: one label per model.
        prompt: token ids, int32 `(tokens,)`.
        source: what the prompt is, in words.
        generate: number of tokens to generate, 2 or more.
        threads: threads inside one operator, in place of the folders'; None keeps those.
        pinned: cores to run on; () for all.
        seconds: time for the measurement; it ends earlier if every interval is narrow enough.
        precision: relative half width of intervals that are narrow enough.
        seed: random seed for the prompt, the order of turns and the bootstrap.
        memory_limit: memory limit in bytes; None for no limit.
    """

    folders: tuple[GenaiFolder, ...]
    labels: tuple[str, ...]
    prompt: Prompt
    source: str
    generate: int = GENERATE
    threads: int | None = None
    pinned: tuple[int, ...] = ()
    seconds: float = 10.0
    precision: float = 0.02
    seed: int = 0
    memory_limit: int | None = None


def generation_request(models: Sequence[str], settings: BenchConfig) -> GenerationRequest:
    """Return the request that the settings make.

    Raises:
        UsageError: A setting that has no meaning here, a folder or a text that does not fit, a prompt that is too long,
            or onnxruntime-genai is not installed.
        ModelError: A folder's configuration cannot be read.
    """
    for name, field in type(settings).model_fields.items():
        if name not in TAKEN and getattr(settings, name) != field.default:
            raise UsageError(
                f"{flag_of(name)} does not go with --prompt and --generate",
                hint="leave it out; provider and session options are those of genai_config.json",
            )
    if settings.threads is not None and len(settings.threads) > 1:
        raise UsageError(
            f"--threads: one number goes with --prompt and --generate, but got {settings.threads}",
            hint="run bench once for each",
        )
    genai_library()
    folders = tuple(GenaiFolder.read(model) for model in models)
    count, generate = settings.prompt or PROMPT, settings.generate or GENERATE
    for folder in folders:
        if folder.longest is not None and count + generate > folder.longest:
            raise UsageError(
                f"--prompt {count} --generate {generate}: {folder.path} takes {folder.longest} tokens in all",
                hint="type smaller numbers",
            )
    if settings.data is None:
        prompt, source = random_prompt(folders, count, settings.seed), f"{count} random tokens"
    else:
        prompt, source = _text_prompt(folders, settings, count), f"{count} tokens of {Path(settings.data).name}"
    pinned = () if settings.pin is None else parse_cores(settings.pin)
    return GenerationRequest(
        folders=folders,
        labels=short_names(models),
        prompt=prompt,
        source=source,
        generate=generate,
        threads=settings.threads[0] if settings.threads else len(pinned) or None,
        pinned=pinned,
        seconds=settings.budget or settings.seconds,
        precision=settings.precision / 100,
        seed=settings.seed,
        memory_limit=settings.memory_limit,
    )


def random_prompt(folders: Sequence[GenaiFolder], count: int, seed: int) -> Prompt:
    """Return random token ids that every folder has, none of them special, int32 `(count,)`.

    Raises:
        UsageError: All ids are special.
    """
    special = reduce(frozenset.union, (folder.special for folder in folders))
    ids = np.setdiff1d(np.arange(min(folder.vocabulary for folder in folders)), sorted(special))
    if not len(ids):
        raise UsageError("the models have no token in common that is not special", hint="give --data TEXT")
    return np.random.default_rng([seed, *b"prompt"]).choice(ids, count).astype(np.int32)


def _text_prompt(folders: Sequence[GenaiFolder], settings: BenchConfig, count: int) -> Prompt:
    """Return the first tokens of a text, by the first folder's tokenizer, int32 `(count,)`.

    Raises:
        UsageError: It is no text, or too short, or a folder has fewer tokens.
    """
    first, data = folders[0].path, settings.data
    if not is_text(data, TextOptions.of(settings), first):
        raise UsageError(
            f"--prompt: the prompt is made of text, but got {data}", hint="give --data text.txt, .jsonl or .parquet"
        )
    texts = read_texts(Path(data), settings.column or COLUMN)
    tokenizer = FolderTokenizer.of_model(str(first), str(data))
    found: list[int] = []
    for document in texts.documents:
        (row,) = tokenizer.rows(["\n".join(document)], None)
        found += row.ids.tolist()
        if len(found) >= count:
            break
    else:
        raise UsageError(
            f"--prompt {count}: {data} holds {len(found)} tokens", hint="give more text, or type a smaller --prompt"
        )
    prompt = np.asarray(found[:count], np.int32)
    for folder in folders:
        if prompt.max() >= folder.vocabulary:
            raise UsageError(
                f"{folder.path} has {folder.vocabulary} tokens, but the text by the tokenizer of {first} has "
                f"token {prompt.max()}",
                hint="leave out --data: random tokens are then those that every model has",
            )
    return prompt
