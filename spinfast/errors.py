"""Errors a user can mend. run.py prints them as one line and exits with code 2; anything else is a bug."""


class UserError(ValueError):
    """Wrong config, data, model or environment. The message says expected, got and what to do, in one line."""


class Busy(UserError):
    """Another process has what can be one's only."""
