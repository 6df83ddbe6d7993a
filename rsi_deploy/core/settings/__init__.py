"""The settings of every verb, each declared once: a field with its type, default, bounds, unit and help.

The options of the command line, the keywords of the Python functions, recipe files and their JSON schema follow from
these fields. It imports no other room and loads nothing heavy.
"""
