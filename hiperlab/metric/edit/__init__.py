"""Scores of edits: distances to the source, directions, masked parts."""
