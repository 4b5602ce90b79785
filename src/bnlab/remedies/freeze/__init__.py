"""Freezing BN so that it stays frozen, and the way back."""
