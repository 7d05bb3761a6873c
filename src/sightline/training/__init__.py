"""A run to trained weights: loop, schedule, optimiser, journal."""
