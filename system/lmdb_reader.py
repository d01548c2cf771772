"""Reads an LMDB folder in a process of its own: `python lmdb_reader.py FOLDER`, keys in, values out. Imports no torch.

The library maps the file and trusts it: a damaged one ends the process that reads it.
"""

import subprocess
import sys
from pathlib import Path

LONGEST = 1 << 28  # bytes of a value


def serve(folder: str) -> None:
    """Answers each line, a key, with a line, the number of bytes (-1 = no such key), and the value."""
    import lmdb

    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        print("open", flush=True)
        for key in sys.stdin:
            with environment.begin(buffers=True) as transaction:
                value = transaction.get(key.strip().encode())
                size = -1 if value is None else len(value)
                sys.stdout.buffer.write(b"%d\n" % size + (bytes(value) if 0 < size <= LONGEST else b""))
                sys.stdout.flush()
    except lmdb.Error as error:
        print(str(error).replace("\n", " "), flush=True)


def start(folder: Path) -> subprocess.Popen:
    """The reader of a folder; what it says first is "open", or why it is not. It ends with this process."""
    command = [sys.executable, "-I", __file__, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    serve(sys.argv[1])
