"""The command line: main.py holds what the user sees, one file per verb what it does."""
