"""Scores against the drawn world's truth."""
