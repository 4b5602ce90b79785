"""Training loops with a planted mishap, and healthy ones, for `bnlab bench watch` and the tests."""
