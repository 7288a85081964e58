"""The command line: Hydra's plumbing, checks that need no torch, one line for every mistake."""
