"""Collects evidence on BN layers from files and models, without judging it."""
