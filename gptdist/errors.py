"""Errors that a user can act on, and the exit codes they map to.

Exit codes: 0 done, 1 a bug (traceback), 2 the user's input, 3 a device or tool is missing or faulty, 75 please requeue,
130 interrupted (128 + SIGINT, as shells say).
"""

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_MISSING, EXIT_REQUEUE, EXIT_INTERRUPTED = 0, 1, 2, 3, 75, 130


class ActionableError(Exception):
    """The message is one line: what was wrong, where, what was expected, what to do. Shown without a traceback."""

    exit_code: int

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed  # True: every rank raises this error, so that one of them need say it


class UserError(ActionableError):
    """The user's input is at fault."""

    exit_code = EXIT_USER


class DamagedError(UserError):
    """A file is there and can be read, but is not what was written."""


class LockedError(UserError):
    """Another run is up in the run directory, whose files are not this start's to touch."""


class LostError(ActionableError):
    """Other ranks are not there, or no longer. The same start may go well another time."""

    exit_code = EXIT_REQUEUE


class MissingError(ActionableError):
    """A device, tool or package that was asked for is not there. The message says which, and how to get it."""

    exit_code = EXIT_MISSING


class ReplicaError(ActionableError):
    """Ranks do not hold the same values of what they should hold alike: a device is at fault."""

    exit_code = EXIT_MISSING
