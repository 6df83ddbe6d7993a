"""The comparison of the compressed model with the dense one: outputs, accuracy, calibration data, MACs."""

import graph_passes as gp
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import PartOutputs, calibration_record
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError
from rsi_deploy.core.progress import at_samples
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.model_pictures import preset_note
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.evaluation.softmax_bound import SoftmaxBound, softmax_bound
from rsi_deploy.exporting.results import DenseModel, Verified
from rsi_deploy.exporting.timing.stage_clock import StageClock
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.report.schema import Accuracy, ProbeOutput, Verification
from rsi_deploy.runtime.feeds.values import arrays_of_outputs
from rsi_deploy.runtime.parity import compare_outputs, explain_random_models, surgery_check
from rsi_deploy.runtime.probe_runs import probe_names, run_probe
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.runtime.shape_trace import trace_run


def verified(
    dense: DenseModel,
    split: SplitModel,
    clock: StageClock,
    *,
    provider: str,
    max_output_error: float | None,
    preset: Preprocessing | None,
    data: CalibrationData | None,
    outputs: dict[str, PartOutputs],
) -> Verified:
    """Compare the compressed model with the dense one.

    Args:
        dense: the dense model.
        split: what the compressed model's split did.
        clock: times the stages.
        provider: onnxruntime provider.
        max_output_error: gate on the error of the outputs, on the check part or else on probe inputs; or None.
        preset: the preprocessing fields that the user set.
        data: calibration data; None without.
        outputs: part of the calibration data -> outputs of the dense model, as far as they are known; more are added.

    Raises:
        GateError: a gate failed.
    """
    notes: list[str] = []
    is_checked = data is not None and dense.outputs is not None
    verification, probe = _outputs(dense, split, clock, None if is_checked else max_output_error, notes)
    if dense.dataset is not None and dense.dataset.kind == "images":
        notes += preset_note(dense.preprocessing, preset, dense.source.name)
    accuracy, bound = _accuracy(dense, split, clock, provider, notes)
    agreement = None
    if data is not None and dense.outputs is not None:
        with clock.stage("certificate"):
            agreement, found = calibration_record(dense.reference, dense.target, data, provider, outputs, dense.proto)
            outputs |= found
            notes += preset_note(dense.preprocessing, preset, dense.source.name) if data.are_pictures else []
            notes += data.notes()
        _gate(agreement.quality, max_output_error)
    macs = {}
    if dense.outputs is not None:
        with clock.stage("trace compressed"):
            counted = trace_run(dense.target, dense.feeds).macs
            macs = {node: count // dense.batch for node, count in counted.items()}
    return Verified(
        verification=verification,
        probe=probe,
        accuracy=accuracy,
        bound=bound,
        agreement=agreement,
        macs=macs,
        notes=tuple(notes),
    )


def _gate(quality: OutputQuality, largest: float | None) -> None:
    """Check that the output error on the check part is at most `largest`.

    Raises:
        GateError: it is larger.
    """
    found = quality.output_error if quality.output_error_at_most is None else quality.output_error_at_most
    if largest is not None and found is not None and found > largest:
        raise GateError(
            f"--max-output-error {100 * largest:g}%: the output error on calibration data may be {100 * found:.3g} % "
            f"(one-sided 95 % limit); allow more, or a larger model"
        )


def _outputs(
    dense: DenseModel, split: SplitModel, clock: StageClock, max_output_error: float | None, notes: list[str]
) -> tuple[Verification, tuple[ProbeOutput, ...]]:
    """The gates on the outputs of a full-rank split and of the compressed model, and the latter's outputs."""
    if dense.outputs is None or dense.expected is None:
        return Verification(exporter=None, surgery=None, approximation=None), ()
    nodes = [node for node in split.nodes if isinstance(node, gp.Split)]
    weights: dict[str, gp.Form] = {node.weight: node.form for node in reversed(nodes)}  # form of its first node
    joint = {node.joint for node in nodes if node.joint}
    with clock.stage("verify surgery"), explain_random_models(dense.path, dense.feeds, "the dense model"):
        surgery = surgery_check(
            dense.path, weights, dense.feeds, dense.outputs, joint=joint, bias=split.biased, graph=dense.graph
        )
    with clock.stage("verify approximation"):
        session = make_session(dense.target)
        outputs = run_probe(session, dense.feeds, dense.target.name)
        names = probe_names(session, outputs)
        del session
        approximation = compare_outputs(
            dense.expected,
            outputs,
            what="approximation gate (compressed against dense, --max-output-error)",
            tolerance=max_output_error,
        )
    if not approximation.informative:
        notes.append("the dense model's probe outputs are all zero: the gates on them show little")
    probe = tuple(ProbeOutput.of(name, array) for name, array in arrays_of_outputs(names, outputs).items())
    return Verification(exporter=dense.exporter, surgery=surgery, approximation=approximation), probe


def _accuracy(
    dense: DenseModel, split: SplitModel, clock: StageClock, provider: str, notes: list[str]
) -> tuple[Accuracy | None, SoftmaxBound | None]:
    """The accuracy of both models, and the softmax bound of a factorized head."""
    dataset, before = dense.dataset, dense.accuracy
    if dataset is None or before is None:
        return None, None
    steps = dense.preprocessing if dataset.kind == "images" else None
    with clock.stage("accuracy compressed"):
        after = evaluate(
            dense.target,
            dataset,
            preprocessing=steps,
            provider=provider,
            reference=dense.reference,
            progress=at_samples,
        )
    accuracy = Accuracy(dense=before, compressed=after)
    factors = None if dense.head is None else split.kept.get(dense.head.weight)
    if dense.head is None or factors is None:
        return accuracy, None
    with clock.stage("softmax bound"):
        feeding = Feeding(dataset, dense.inputs, dense.preprocessing)
        size, count = feeding.axes.fixed or 64, len(feeding.dataset)
        # The tapped model takes whole batches only where its batch is fixed; samples left over are left out.
        whole = count // size * size if feeding.axes.fixed else count
        if not whole:
            notes.append(f"no softmax bound: {count} samples are fewer than the model's batch, {size}")
            return accuracy, None
        batches = (feeds for feeds, _ in feeding.batches(size, whole))
        return accuracy, softmax_bound(dense.path, dense.head, factors, batches)
