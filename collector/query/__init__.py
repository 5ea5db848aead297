"""Answers questions about a run: views and SQL over its tables, counts, intervals and tests."""
