"""Converts BN layers to another class, and back."""
