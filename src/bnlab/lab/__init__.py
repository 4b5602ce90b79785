"""Small experiments on what BN does."""
