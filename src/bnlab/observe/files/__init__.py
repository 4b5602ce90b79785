"""Reads BN state from files: one format a module. Files are data, nothing in them is run."""
