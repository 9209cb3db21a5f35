"""What a user can mend: entry scripts print the message in one line and exit with the code."""


class UserError(Exception):
    """Something the user can mend: entry scripts print it as one line and exit with its code."""

    exit_code = 2


class ConfigError(UserError):
    """A setting that cannot be, with its key, its value and the cure."""


class DataError(UserError):
    """A data file that cannot be used, with file, line and field."""
