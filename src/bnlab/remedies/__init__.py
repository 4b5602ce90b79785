"""What changes a model: one remedy a file. Everything not named in a receipt is kept."""
