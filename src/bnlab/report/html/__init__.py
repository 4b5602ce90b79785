"""Pages to look at: one self-contained file each, which opens without a network."""
