"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. One line: what is wrong, where (file:line or config key), how to mend it."""
