"""Turning BN layers into those of another class, and back."""
