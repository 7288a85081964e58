"""Muon, and weight decay for methods that train offsets of weights."""
