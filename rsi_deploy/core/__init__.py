"""Definitions that all rooms use: errors, type aliases, settings and units, sites, progress, text; imports no room."""
