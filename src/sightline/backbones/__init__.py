"""Pixels to `Tokens` through an encoder: one file for each kind, with its `FAMILIES` and `VARIANTS` tables."""
