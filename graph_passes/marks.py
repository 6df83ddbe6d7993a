"""The marks of new nodes: values of `rsi_deploy.split` in their metadata, which survive saving."""

MARK = "rsi_deploy.split"
"""Key of the marks. A split has a "right" and a "left" node, or those of another form; "bias" adds a correction.
"units" and "heads" mark the second node of these forms, which is the only one once the first one is folded."""
CONCAT = "concat"
"""Joins the pivots and the other outputs of a pivoted split."""
PERMUTATION = "permutation"
"""A Gather that restores the order of channels behind a pivoted split."""
SELECTION = "selection"
"""Selects the hidden units that a split in the form "units" keeps."""
BASES = "bases"
"""Takes fewer numbers from each attention head, in the form "heads"."""
