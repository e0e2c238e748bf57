"""Errors that a user can act on, and the exit codes they map to.

Exit codes: 0 done, 1 a bug (traceback), 2 the user's input, 3 a device or tool is missing, 75 please requeue.
"""

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_MISSING, EXIT_REQUEUE = 0, 1, 2, 3, 75


class UserError(Exception):
    """The user's input is at fault. The message is one line: what was wrong, where, what was expected, what to do."""

    exit_code = EXIT_USER


class MissingError(Exception):
    """A device, tool or package that was asked for is not there. The message says which, and how to get it."""

    exit_code = EXIT_MISSING
