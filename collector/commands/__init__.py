"""The commands of `collector`: one frozen dataclass each, whose fields are the flags and their docstrings the help.

`run` does the work and returns the exit status: 0 done, 1 the run is incomplete or unsound. What stops it is raised;
`__main__` makes one line of it. Every call of the command line imports all modules here, so what is heavy is imported
by the `run` that needs it.
"""
