"""What no paper is about: rows to batches, the run's folder, checkpoints, evaluation. It holds no
loss and no training loop.
"""


class InputError(SystemExit):
    """Bad input: one sentence for the user. Uncaught, Python prints it and exits with status 1."""


def first_line(error: Exception) -> str:
    """An exception's first line, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
