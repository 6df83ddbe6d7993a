"""The HTML page: sections, tables and plots, rendered by one template."""
