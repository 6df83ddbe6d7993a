"""Time models of onnxruntime-genai side by side while they generate text.

    block         every model generates once, in shuffled order
    first token   from the prompt to the first token: prefill, bound by arithmetic
    next token    every further one: decode, bound by the bytes of the weights

Both phases have their own cell in the document, with medians, percentiles and verdicts as those of `bench`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.benchmark.blocks import Cell, Progress, run_cells
from rsi_deploy.benchmark.generation.request import GenerationRequest
from rsi_deploy.benchmark.latency import (
    PARTIAL_BLOCKS,
    check_targets,
    reason_of_end,
    time_notes,
    variant_notes,
    variant_result,
)
from rsi_deploy.benchmark.matrix import WARM_SHARE, bench_document, keep_on_interrupt, variant_file
from rsi_deploy.benchmark.processes import generation_memory
from rsi_deploy.benchmark.result import BenchDocument, BenchResult, Phase, VariantResult
from rsi_deploy.benchmark.sections import Generation
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, is_settled
from rsi_deploy.benchmark.variants import Variant
from rsi_deploy.core.types import Floats, Interval
from rsi_deploy.runtime.machine import environment
from rsi_deploy.runtime.pinning import pinned
from rsi_deploy.runtime.placement import Placement

PHASES: Mapping[Phase, slice] = {"first token": slice(0, 1), "next token": slice(1, None)}
"""Phase -> its tokens among those of a generation."""
METHOD = (
    "models interleaved in shuffled blocks in one process, one generation each through onnxruntime-genai, greedily and "
    "past tokens that end a text; first token: append_tokens and the first generate_next_token; next token: each "
    "further generate_next_token; making the generator is not timed; garbage collector off; clock "
    "time.perf_counter_ns; bootstrap over paired blocks, runs of neighbours together: 99 % intervals for speedups, "
    "95 % for medians; a difference is claimed if the whole interval is beyond 1 %"
)


@dataclasses.dataclass(kw_only=True)
class GeneratingVariant(Variant):
    """A model that generates; a visit is one generation, with the time of each token.

    Attributes:
        generate: function that generates once and returns the milliseconds of each token.
    """

    generate: Callable[[], Floats]

    def visit(self) -> Floats:
        """Generate once and return the milliseconds of each token."""
        return self.generate()

    def warm_up(self, seconds: float) -> None:
        """Generate at least once and until the times of the next tokens settle, after at most about `seconds`."""
        times: list[float] = []
        spent = 0.0
        while not times or (not is_settled(times) and spent < seconds):
            found = self.visit()
            times += found[PHASES["next token"]].tolist()
            spent += float(found.sum()) / 1e3
            self.warmup_calls += 1
        self.warm = is_settled(times) or len(times) < 10  # so few that nothing can be said


class GenerationCell(Cell):
    """One prompt during its measurement; both phases must be precise."""

    def phase(self, phase: Phase) -> Cell:
        """Return the measured cell of one phase."""
        part = PHASES[phase]
        variants: list[Variant] = [
            dataclasses.replace(variant, visits=[visit[part] for visit in variant.visits]) for variant in self.variants
        ]
        return Cell(name=phase, variants=variants, seconds=self.seconds, precise=self.precise)

    def widest(self, seed: int) -> float:
        """Return the relative half width of the widest interval of both phases."""
        return max(self.phase(phase).widest(seed) for phase in PHASES)


def run_generation(request: GenerationRequest, *, command: str = "", progress: Progress | None = None) -> BenchDocument:
    """Measure everything in a request.

    Args:
        request: models and prompt.
        command: command line for the document.
        progress: function that is called with the current step and the share of the time that is over.

    Raises:
        UsageError: A request that cannot be measured.
        ModelError: onnxruntime-genai does not read a model, or fails.
        KeyboardInterrupt: The user interrupted before 5 blocks.
    """
    check_targets(request.seconds, request.precision)
    machine = environment()
    files = tuple(
        variant_file(folder.file, label) for folder, label in zip(request.folders, request.labels, strict=True)
    )
    notes: list[str] = []
    sections: dict[str, Any] = {}
    with pinned(request.pinned):
        cells = _measured(request, progress)
        sections["generation"] = tuple(_speeds(request, *arms) for arms in zip(*(c.arms for c in cells), strict=True))
        if cells[0].stopped != "interrupted":
            if progress is not None:
                progress("memory", 1.0)
            with keep_on_interrupt(notes):
                sections["memory"] = generation_memory(
                    [folder.path for folder in request.folders],
                    request.labels,
                    request.prompt.tolist(),
                    request.generate,
                    request.threads,
                    limit=request.memory_limit,
                )
    return bench_document(cells, sections, notes, command=command, environment=machine, arms=files)


def _measured(request: GenerationRequest, progress: Progress | None) -> list[BenchResult]:
    """Load, warm up and measure the models; they are closed afterwards."""
    cell = GenerationCell(name="generation", variants=[])
    for folder, label in zip(request.folders, request.labels, strict=True):
        if progress is not None:
            progress(f"loading {label}", 0.0)
        variant = _variant(request, folder.load(request.threads), label, folder.file)
        variant.warm_up(WARM_SHARE * request.seconds / len(request.folders))
        cell.variants.append(variant)
    interrupted = run_cells(
        [cell], seconds=request.seconds, precision=request.precision, seed=request.seed, progress=progress
    )
    if interrupted and cell.blocks < PARTIAL_BLOCKS:
        raise KeyboardInterrupt
    return [_result(request, cell.phase(phase), phase, interrupted=interrupted) for phase in PHASES]


def _variant(request: GenerationRequest, model: Any, label: str, file: Path) -> GeneratingVariant:
    def generate() -> Floats:
        times: Floats = model.generate(request.prompt, request.generate)
        return times

    placement = Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
    return GeneratingVariant(label=label, model=str(file), call=generate, placement=placement, generate=generate)


def _result(request: GenerationRequest, cell: Cell, phase: Phase, *, interrupted: bool) -> BenchResult:
    import onnxruntime

    stopped = reason_of_end(cell, interrupted=interrupted)
    width, first = cell.widest(request.seed), request.folders[0]
    inputs = {"prompt": request.source}
    if phase == "next token":
        inputs["generated"] = f"{request.generate} tokens"
    notes = time_notes(dataclasses.replace(cell, width=width), stopped, request.precision)
    for variant, folder in zip(cell.variants, request.folders, strict=True):
        notes += variant_notes(variant)
        if (folder.provider, folder.session) != (first.provider, first.session):
            options = ", ".join(f"{name}={value}" for name, value in folder.session.items())
            notes.append(
                f"{variant.label} runs by its genai_config.json on {folder.provider} with {options or 'no options'}, "
                f"other than {request.labels[0]}"
            )
    return BenchResult(
        arms=tuple(variant_result(cell, index, request.seed) for index in range(len(cell.variants))),
        provider=first.provider,
        provider_options=first.session,
        threads=request.threads,
        pinned=request.pinned,
        batch=1,
        inputs=inputs,
        seed=request.seed,
        seconds=cell.seconds,
        stopped=stopped,
        asked_precision=request.precision,
        reached_precision=width if np.isfinite(width) else None,
        partial=stopped == "interrupted" or cell.blocks < MIN_BLOCKS,
        phase=phase,
        onnxruntime=onnxruntime.__version__,
        method=METHOD,
        notes=tuple(notes),
    )


def _speeds(request: GenerationRequest, first: VariantResult, following: VariantResult) -> Generation:
    """Return the speeds of one model by the times of its two phases."""
    tokens = len(request.prompt)
    return Generation(
        label=first.label,
        prompt_tokens=tokens,
        generated_tokens=request.generate,
        first_token_ms=first.median_ms,
        first_token_interval_ms=first.median_interval_ms,
        prefill_per_second=1e3 * tokens / first.median_ms,
        prefill_per_second_interval=_rates(tokens, first.median_interval_ms),
        decode_per_second=1e3 / following.median_ms,
        decode_per_second_interval=_rates(1, following.median_interval_ms),
    )


def _rates(tokens: int, ends: Interval) -> Interval:
    return 1e3 * tokens / ends[1], 1e3 * tokens / ends[0]
