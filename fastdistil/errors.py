"""The two errors that the command line turns into one line and an exit code."""


class UserError(ValueError):
    """A bad argument, key, path or input file. The message names it and says what to do; exit code 2."""


class RunError(RuntimeError):
    """A failure while running that the user did not cause, such as a full disk; exit code 1."""


def one_line(error: Exception) -> str:
    """What went wrong, in one line: of other errors than ours, with the kind of error."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | RunError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
