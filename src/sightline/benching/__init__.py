"""Sightline and others on the same machine in the same run: what `sightline bench` measures."""
