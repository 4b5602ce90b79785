"""Renders records as HTML pages. Each page is one self-contained file that opens without a network."""
