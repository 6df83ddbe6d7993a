"""The renderer for terminals."""
