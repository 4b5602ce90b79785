"""The backends for operators that bnlab's own kernels cannot run: torch's kernels, or formulas."""
