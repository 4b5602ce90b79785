"""Evidence: what is there, never what to think of it."""
