"""Produces everything that people look at: terminal output, pages, figures and exports."""
