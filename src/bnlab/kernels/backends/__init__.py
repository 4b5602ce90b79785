"""What runs an operator where there is no kernel of bnlab's own: torch's kernels, or formulas."""
