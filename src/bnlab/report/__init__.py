"""Draws records. It imports nothing else of bnlab, so a saved JSON file can be drawn without torch."""
