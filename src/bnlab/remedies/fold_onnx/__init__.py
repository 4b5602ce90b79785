"""Folds BN in ONNX files, and checks that the output stays the same."""
