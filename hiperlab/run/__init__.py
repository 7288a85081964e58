"""The door: `python -m hiperlab.run method=neti data=cats` checks what was asked and starts it, alone or as a sweep."""
