"""Folds BN into the layers around it, and checks that the output stays the same."""
