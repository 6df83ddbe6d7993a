"""The parts of a calibrated export: open the data, decide, fit, search, and compare with the check part."""
