"""The exceptions whose message is for people: what the user can mend, and what ended a run from outside,
and that it was asked to end."""


class UserError(ValueError):
    """A mistake in what the user gave (config, file, name, size).

    Its message names the value and the fix. Programs show the message alone, without a traceback, and end with
    exit status 2.
    """


class Stopped(Exception):
    """A run was asked to stop, and has saved what it was at.

    Programs show the message alone and end with exit status 75 (EX_TEMPFAIL of sysexits.h: try again later), under
    torchrun with 0, or it would start the ranks again.
    """


class Failure(RuntimeError):
    """What ended a run without being the user's mistake: a disk, a network, a process that died.

    Its message says what failed, where, and what to look at. Programs show the message alone, without a
    traceback, and end with exit status 1.
    """
