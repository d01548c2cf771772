"""The machine: command lines, processes, files, compilation, and the classes that a config may name."""

import sys

from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user's, shown as one line with exit code 2: what was found and what is needed."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """A text with what would act on a terminal made visible, as \\x1b: names in strangers' files may hold it."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def warn(line: str) -> None:
    """To stderr, above a progress bar; not to a logger, which a launcher's settings may have switched off."""
    tqdm.write(f"warning: {printable(line)}", file=sys.stderr)
