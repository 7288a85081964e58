"""Finished runs side by side: which method did best, how sure that is, what it cost, what its pictures look like."""
