"""The mathematics of fitting factors to data: moments, regressions, alternating least squares, sensitivities."""
