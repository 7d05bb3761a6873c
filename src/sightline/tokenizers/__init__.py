"""Pixels to `Tokens`: one file for each way to cut an image, with its `TOKENIZERS` table."""
