"""Errors a user can mend. run.py prints them as one line and exits with code 2; anything else is a bug."""


class UserError(ValueError):
    """Wrong config, data, model or environment. The message says expected, got and what to do, in one line."""


class Busy(UserError):
    """Another process has what can be one's only."""


def out_of_memory(error: Exception) -> UserError:
    """What is said where memory ran out and nothing smaller can be tried."""
    return UserError(
        f"memory ran out ({' '.join(str(error).split())[:200]}); everything done is saved. Lower "
        "generation.batch_size, or give the memory back that others hold, and run again"
    )
