"""Modules that are copied into packages as they are: they run inside the engines, without rsi-deploy."""
