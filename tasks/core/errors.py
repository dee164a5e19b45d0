"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Input that cannot be used: one line naming the file or option, its value and what was expected."""
