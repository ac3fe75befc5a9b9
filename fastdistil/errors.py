"""The two errors that the command line turns into one line and an exit code."""


class UserError(ValueError):
    """A bad argument, key, path or input file. The message names it and says what to do; exit code 2."""


class RunError(RuntimeError):
    """A failure while running that the user did not cause, such as a full disk; exit code 1."""
