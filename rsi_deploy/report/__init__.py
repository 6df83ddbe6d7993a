"""What an export found: the versioned record, and its renderers for terminals and browsers."""
