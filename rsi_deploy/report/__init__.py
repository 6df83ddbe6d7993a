"""What an export found out: the versioned record, and the ways to look at it."""
