"""A place on disk, or a formula, to samples."""
