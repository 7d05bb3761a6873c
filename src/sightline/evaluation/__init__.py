"""Features or predictions to numbers."""
