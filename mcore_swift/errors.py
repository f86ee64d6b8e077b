"""The one exception a user is meant to read.

`cli/` catches `UserError`, prints its message and remedy, and exits with code 2. Everything else is a
defect of ours and keeps its traceback.
"""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: what is wrong (file:line, row or flag) and what to do about it.

    message: one sentence that names the file, the row or the flag.
    remedy: what to type or change; may be empty when the message says it already.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple:  # keeps the remedy when the error crosses a process boundary
        return type(self), (self.message, self.remedy)


class TrainingStopped(UserError):
    """Training cannot go on, and the reason is in the run (data, learning rate), not in our code."""

    exit_code = 1


class DiskFull(UserError):
    """A disk without room for a file. Ranks that share the disk each find it at a file of their own; one tells it."""


class UserErrors(UserError):
    """Several mistakes found together, so that a user mends them in one go and not one a run."""

    def __init__(self, errors: Iterable[UserError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in self.errors))

    def __reduce__(self) -> tuple:
        return type(self), (self.errors,)


def raise_together(errors: Iterable[UserError]) -> None:
    """Raise nothing, the one error, or all of them as one `UserErrors`."""
    errors = list(errors)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)
