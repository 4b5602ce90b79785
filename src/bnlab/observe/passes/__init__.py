"""Passes of batches through a model, which is untouched afterwards."""
