"""What no paper is about: rows to batches, the run's folder, checkpoints, evaluation. It holds no
loss and no training loop.
"""


class InputError(SystemExit):
    """Bad input: one sentence for the user. Uncaught, Python prints it and exits with status 1."""
