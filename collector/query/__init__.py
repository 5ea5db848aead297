"""Answers from a finished run: views and SQL over its tables, counts, intervals and tests."""
