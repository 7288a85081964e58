"""Sweeps: one fresh process per job."""
