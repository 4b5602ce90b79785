"""The benchmark of a GPU: one module for each section, and what times, prints and records them."""
