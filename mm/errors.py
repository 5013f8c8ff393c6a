"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave (config, file, name, size).

    Its message names the value and the fix. Programs show the message alone, without a traceback, and end with
    exit status 2.
    """
