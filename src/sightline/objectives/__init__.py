"""Batch to `Step`: what is learned, one file for each method, with its `OBJECTIVES` table."""
