"""Networks with one planted cause each, healthy networks, and the findings that `bnlab.check` must report for them.

`table.py` was written before the tool ran on any case. docs/background.md describes the failures. Some known failures
have no case here because they leave no trace in a model with data:

- a batch with one value per channel, for which torch itself raises an error;
- faults that need several processes, or the history of the run;
- a fold, after which no BN layer is left;
- a permuted input, which runs only if two sizes agree by accident;
- training problems with BN layers whose state is healthy.
"""
