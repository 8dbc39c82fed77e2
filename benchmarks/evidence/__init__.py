"""Which method gets how far from the same checkpoint: runs of several methods and training seeds, one table at the end.

See `__main__.py` for the command.
"""
