"""How fast this machine trains and draws, method by method: `python -m hiperlab.bench`."""
