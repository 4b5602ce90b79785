"""Draws records; knows nothing else, so that a saved JSON can be drawn without torch."""
