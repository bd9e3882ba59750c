"""One module for each command of `python -m bench`; each yields the rows of its table."""
