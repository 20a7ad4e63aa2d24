"""The one error class of the project."""


class GraphPruneError(Exception):
    """Something the user can act on: says what is wrong, where, and what to do.

    Whenever it is raised, the user's model and files are as they were before the call.
    """
