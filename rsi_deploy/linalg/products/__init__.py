"""Matrix products of the solver: several precisions, oneDNN, and how fast each of them is on this machine."""
