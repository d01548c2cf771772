"""Files on the Hugging Face hub, named hf:owner/name or hf:owner/name/file, by way of huggingface_hub's cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from system import UserError


def local(path: str | Path, kind: str = "model") -> Path:
    """`path` as it is; for hf:owner/name the folder, for hf:owner/name/file the file, downloaded unless it is cached.

    kind: model or dataset. Without a network, the cached copy is used. Raises UserError where there is none.
    """
    if not str(path).startswith("hf:"):
        return Path(path)
    owner, _, rest = str(path).removeprefix("hf:").partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise UserError(f"{path}; needed: hf:owner/name or hf:owner/name/file")
    from huggingface_hub import hf_hub_download, snapshot_download

    with refusals(f"{path} is not cached, and the hub did not send it"):
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", file, repo_type=kind))
        # An uploaded index or lock of ours would be a link here, into the hub's cache.
        return Path(snapshot_download(f"{owner}/{name}", repo_type=kind, ignore_patterns=".*"))


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """A missing login or network inside, or a name that the hub refuses, becomes a UserError: what, and the reason."""
    try:
        yield
    except Exception as error:  # the hub's client and the HTTP library under it each raise their own
        raise UserError(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
