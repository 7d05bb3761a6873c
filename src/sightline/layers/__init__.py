"""The mathematics that every model shares."""
