"""Editing by attention: Prompt-to-Prompt, aligned tokens, edited attention maps."""
