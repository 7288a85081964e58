"""Runs and artifacts of earlier versions, which every later version must still read."""
