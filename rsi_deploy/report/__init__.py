"""The records of exports, sweeps and verification, and their renderers: terminal, HTML page and Markdown card.

record --> Table (rows of texts) --> tables/ for terminals, pages/ for HTML, card.py for Markdown
"""
