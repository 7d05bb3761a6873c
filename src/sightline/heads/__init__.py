"""`Tokens` to an output, its loss, and the answer read from it: one file for each task, with its `HEADS` table."""
