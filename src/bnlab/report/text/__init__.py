"""Records as text, for terminals and pipes."""
