"""The commands of `collector`: one frozen dataclass each, with a field per flag and its docstring as help text.

`run` does the work and returns the exit status: 0 done, 1 the run is incomplete or unsound. It raises on errors, which
`__main__` prints in one line. The command line always imports all modules here, so heavy dependencies are imported
inside the `run` that needs them.
"""
