"""Folding BN into the layers around it, with proof."""
