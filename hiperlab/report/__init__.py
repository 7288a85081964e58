"""What a run keeps and shows of itself: checkpoints, signals, progress, loggers, samples and the page.

Knows the contract; never a method, never the run.
"""
