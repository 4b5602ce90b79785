"""Renders records as text for terminals and pipes."""
