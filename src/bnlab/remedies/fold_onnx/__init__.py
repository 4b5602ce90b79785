"""Folding BN in ONNX files, with proof."""
