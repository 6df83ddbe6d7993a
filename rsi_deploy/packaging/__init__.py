"""Bundles made ready for the engines that serve them."""
