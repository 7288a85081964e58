"""Optimizers and what they decay."""
