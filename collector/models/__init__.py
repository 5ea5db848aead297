"""Finds, loads and quantizes models, and reads what their routers return."""
