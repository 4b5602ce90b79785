"""Programs: graphs of operators, as torch.export and torchao write them, opened as models whose BN layers are modules.

An exported program normalises by operators on buffers. Its BN layers are the operators with their buffers, named after
these. `opened` puts modules that share the tensors of the program in their place, so that everything that observes a
model also observes a program.
"""
