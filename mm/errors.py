"""The exceptions whose message is for people: what the user can mend, and what ended a run from outside."""


class UserError(ValueError):
    """A mistake in what the user gave (config, file, name, size).

    Its message names the value and the fix. Programs show the message alone, without a traceback, and end with
    exit status 2.
    """


class Failure(RuntimeError):
    """What ended a run without being the user's mistake: a disk, a network, a process that died.

    Its message says what failed, where, and what to look at. Programs show the message alone, without a
    traceback, and end with exit status 1.
    """
