"""Watches a training run: its events, and running statistics that move once a step."""
