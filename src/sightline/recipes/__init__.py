"""Runs as Python functions, each with its expected time and result in its docstring."""
