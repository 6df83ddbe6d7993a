"""`rsi-deploy eval`: accuracy alone."""

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import onnx_path
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.settings.verbs import EvalConfig


@click.command("eval", cls=Verb)
@click.argument("model", metavar="MODEL.onnx")
@settings_options(EvalConfig)
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def evaluate_verb(model: str, settings: EvalConfig, *, as_json: bool) -> None:
    """Accuracy of an ONNX model; the preprocessing stored in it is used unless options say otherwise.

    With labels: top-1 and top-5. Of a decoder on text: perplexity. With a --reference: agreement and KL of class scores
    or next tokens, cosine and distance of other outputs, and whether as many answers are right (McNemar's exact test).
    """
    from rsi_deploy.data.picture_settings import preprocessing_of
    from rsi_deploy.data.text_data import TextOptions, with_text
    from rsi_deploy.evaluation.accuracy import evaluate_all
    from rsi_deploy.report.tables.accuracy import print_accuracies

    reference = settings.reference
    models = [model] if reference is None else [reference, model]
    paths = [onnx_path(name) for name in models]
    with progress_bar("samples", is_short=True) as progress:
        results = evaluate_all(
            paths,
            with_text(settings.data, TextOptions.of(settings), model),
            preprocessing=preprocessing_of(settings),
            provider=settings.provider,
            batch_size=settings.batch,
            outputs=settings.outputs,
            limit=settings.limit,
            progress=lambda done, total: progress("", done - 1, total),
        )
    result = results[-1]
    if as_json:
        click.echo(result.model_dump_json(indent=2))
    else:
        print_accuracies(console(), list(zip(models, results, strict=True)), reference=reference or "")
    if result.partial:
        raise KeyboardInterrupt
