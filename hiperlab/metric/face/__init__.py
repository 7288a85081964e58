"""Scores of people: face identity and detection."""
