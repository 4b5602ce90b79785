"""Reads the parts of an ONNX model that say something about BN. The model is parsed but never run."""
