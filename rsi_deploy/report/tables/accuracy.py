"""Accuracy of one or several models on the terminal."""

from rich.console import Console
from rich.markup import escape

from rsi_deploy.evaluation.next_tokens import PROMPT_TOKENS, STEPS
from rsi_deploy.report.bench_tables import NamedResults, accuracy_table, text_table, value_table
from rsi_deploy.report.tables.terminal import print_notes, print_table

_SENTENCES = ("#samples", "paired test")
"""Columns of the table that are sentences below it."""


def print_accuracies(console: Console, results: NamedResults, *, reference: str = "") -> None:
    """Print the accuracy of models on the same data.

    Args:
        console: the terminal.
        results: each model's name and accuracy, in order.
        reference: name of the model with which the others are compared, or "".
    """
    if any(result.kind == "classes" for _, result in results):
        print_table(console, accuracy_table(results).without(_SENTENCES).transposed())
    print_table(console, text_table(results).transposed())
    print_table(console, value_table(results))
    first = results[0][1]
    provider = first.provider.removesuffix("ExecutionProvider").lower()
    against = f", compared with {reference}" if reference else ""
    counted = f"{first.samples:,} samples"
    if first.text is not None:
        documents = f"{first.text.documents:,} document{'s' * (first.text.documents != 1)}"
        counted = f"{first.text.tokens:,} tokens of {first.samples:,} windows, {documents}"
    console.print(escape(f"{counted}, {provider}{against}"), style="dim")
    for name, result in results:
        if result.paired is not None:
            change, (low, high) = result.paired.change, result.paired.change_interval
            console.print(
                escape(f"{name}: {result.paired.verdict}; top-1 {change:+.2f} points [{low:+.2f}, {high:+.2f}]")
            )
    if (last := results[-1][1].text) is not None and last.prompts:
        console.print(
            f"same greedy tokens: of {STEPS} after the first {PROMPT_TOKENS} of {last.prompts} documents", style="dim"
        )
    print_notes(console, list(dict.fromkeys(note for _, result in results for note in result.notes)))
    if first.partial:
        print_notes(console, ["interrupted; only the first samples of the data were used"])
