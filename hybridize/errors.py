"""The errors a user can meet. Each carries one line that says what, where, what was expected and the next step."""


class HybridizeError(Exception):
    """Base of every error that is the user's to mend; the command line prints its message and exits with 2."""


class ConfigError(HybridizeError, ValueError):
    """A recipe, plan, option or name that cannot be used as it stands."""


class CheckpointError(HybridizeError):
    """A checkpoint that is missing, incomplete, misshapen or not what its index says."""


class DataError(HybridizeError):
    """Text that cannot be read, or too little of it."""


class TrainingError(HybridizeError):
    """A run that was stopped before it could do harm, such as a loss that is not finite."""


class StoppedError(SystemExit):
    """A signal asked for an end and the state is saved; as the exit of a program, its code is 128 + the signal's number.

    Args:
        message: where it stopped.
        code: the exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


class MissingDependencyError(HybridizeError, ImportError):
    """An optional package is absent; the message holds the pip line."""


class GateFailedError(HybridizeError):
    """A verdict that did not pass where one is required."""
