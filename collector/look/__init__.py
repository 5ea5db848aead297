"""Pages, figures and terminal output: everything that a person looks at."""
