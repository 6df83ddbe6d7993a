"""Exports in low precision: make models of several precisions, and choose one."""
