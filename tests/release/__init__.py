"""Checks of a release: vulnerabilities (audit), licences and lower bounds of versions."""
