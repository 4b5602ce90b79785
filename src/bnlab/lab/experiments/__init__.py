"""The experiments, each in a module of its own."""
