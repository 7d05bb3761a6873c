"""Image files to predictions, fast."""
