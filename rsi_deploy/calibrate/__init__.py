"""Statistics of what a network feeds its sites, and factors fitted to them."""
