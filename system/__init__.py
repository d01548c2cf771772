"""The machine: command lines, processes, files, compilation, and the classes that a config may name."""


class UserError(ValueError):
    """A mistake of the user's, shown as one line with exit code 2: what was found and what is needed."""
