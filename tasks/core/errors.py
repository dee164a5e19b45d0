"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Input that cannot be used: one line naming the file or option, its value and what was expected."""


def expect(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise `UserError` unless the `value` of the option `name` is `valid`."""
    if not valid:
        raise UserError(f"{name}: {value!r} was given, {expected} was expected")
