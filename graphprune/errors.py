"""The one error class of the project, and what it says of others."""


class GraphPruneError(Exception):
    """Something the user can act on: says what is wrong, where, and what to do.

    Whenever it is raised, the user's model and files are as they were before the call.
    """


def first_line(error: BaseException) -> str:
    """The message of an error of some library, of which the rest may be pages."""
    return str(error).strip().split("\n")[0]
