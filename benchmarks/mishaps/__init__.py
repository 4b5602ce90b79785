"""Networks with one planted cause each, healthy networks, and what `bnlab.check` must say about them.

`table.py` was written from design.md before the tool was run on a single case. Failure modes F1..F32 of papers.md that
are not here leave no trace in a model with data: F6 raises by itself, F19 and F20 need ranks, F22 needs the history of
the run, F27 leaves no BN layer behind, F28 runs only where two sizes
agree by accident, F32 has a BN state that is fine.
"""
