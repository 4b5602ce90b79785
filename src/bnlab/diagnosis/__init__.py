"""Runs the checks on what was observed, and says in one sentence what they show."""
