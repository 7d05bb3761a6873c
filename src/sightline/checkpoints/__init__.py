"""Weights of other ecosystems to ours and back: one file for each naming scheme, with its `SCHEMES` table."""
