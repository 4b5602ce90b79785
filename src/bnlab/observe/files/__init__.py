"""Reads BN state from files, with one module per format. A file is data: nothing in it is run."""
