"""Passes of batches through a model, which restore the model afterwards."""
