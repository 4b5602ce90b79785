"""The remedies, which change a model: one remedy per file. A remedy keeps everything that its receipt does not list."""
