"""Where files come in that somebody else may have made: nothing else opens a model, weights, arrays or pictures."""
