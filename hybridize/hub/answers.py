"""What the Hub and the way to it can answer, each as one line that says what to do; no line ever holds a token."""

import contextlib
import errno
from collections.abc import Iterator
from urllib.parse import urlsplit

from hybridize.errors import CheckpointError, ConfigError
from hybridize.redact import scrub, scrubbed_logs


def check_endpoint() -> None:
    """Refuse an endpoint with a name or password in it, which would stand in every log line. Raises ConfigError."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    if parts.username is not None or parts.password is not None:
        raise ConfigError("HF_ENDPOINT: holds a name or password, expected none in a URL. Put a token into HF_TOKEN")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"HF_ENDPOINT: got {scrub(constants.ENDPOINT)!r}, expected such as https://huggingface.co")


@contextlib.contextmanager
def asking(what: str, writing: bool = False) -> Iterator[None]:
    """Around every call of huggingface_hub: no log line with a token, and each failure as one line.

    Args:
        what: the repository, which begins the message.
        writing: whether something is being sent.

    Raises:
        CheckpointError: whatever the Hub, the network, the cache's disk or the name had against it.
        ConfigError: the endpoint cannot be used.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # httpx's or httpx2's, as huggingface_hub is built on the one or the other.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    check_endpoint()
    with scrubbed_logs():
        try:
            yield
        # Uploads wrap what went wrong in a RuntimeError, and Xet raises nothing else.
        except (transport, EntryNotFoundError, OSError, HFValidationError, ValueError, RuntimeError) as error:
            message = scrub(f"{what}: {explain(error, what, writing)}")
            _clean(error)
            raise CheckpointError(message) from None


def _clean(error: BaseException | None) -> None:
    """Scrub the texts of an error and of those it came from, for whoever prints all of them."""
    while error is not None:
        error.args = tuple(scrub(part) if isinstance(part, str) else part for part in error.args)
        error = error.__cause__ or error.__context__


def explain(error: BaseException, repo: str, writing: bool) -> str:
    """One line on what went wrong and what to do. It may quote the library: scrub it."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so that the Hub is not asked. Unset it{'' if writing else ', or give a local directory'}"
    if isinstance(error, errors.HFValidationError):
        return f"is no name of a repository ({_first_line(error)}). Expected one such as me/model"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return _of_status(error, error.response.status_code, repo, writing)
    cause = error.__cause__
    if cause is not None and isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)):
        if isinstance(error, errors.LocalEntryNotFoundError) and not isinstance(cause, errors.HfHubHTTPError):
            return "not in the local cache and the Hub cannot be reached; connect, or give a local directory"
        return explain(cause, repo, writing)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "not in the local cache, or not all of it, and the Hub is not asked (HF_HUB_OFFLINE); give a local directory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of the Hub's cache is full. Make room or set HF_HOME, then run again: files that came are kept"
    again = "run again, nothing is sent twice" if writing else "run again, files that came are kept"
    if isinstance(error, errors.HfHubHTTPError.__bases__[0]):
        kind = type(error).__name__
        return f"the Hub cannot be reached ({kind}). Connect, then {again}" if "Connect" in kind else (
            f"the connection broke ({kind}); {again}"
        )  # fmt: skip
    return f"cannot be {'sent' if writing else 'fetched'} ({_first_line(error)}); {again}"


def _of_status(error: BaseException, status: int, repo: str, writing: bool) -> str:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    login = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"gated. Accept its licence on https://huggingface.co/{repo.split('@')[0]}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such branch, tag or commit. Look at its page for those it has"
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub does not know the token (401), it may be missing, expired or revoked: {login}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"no such repository on the Hub, or it is private and the token may not see it ({status}): {login}"
    if status == 403:
        who = repo.split("/")[0]
        return (
            f"the token may not write there (403). Take one with write access to {who}, or another name" if writing
            else f"the token may not read it (403). Ask {who} for access, then {login}"
        )  # fmt: skip
    if status == 409:
        return "another change came in between, or the name is taken (409). Run again, or choose another name"
    if status == 412:
        return "the branch moved while files were sent (412). Run again, nothing is sent twice"
    if status == 429:
        return f"too many requests (429). Wait {_wait(response)}, then run again; nothing is sent or fetched twice"
    if status >= 500:
        return f"the Hub has trouble of its own ({status}). Run again later; nothing is sent or fetched twice"
    said = getattr(error, "server_message", None) or _first_line(error)
    return f"refused by the Hub ({status}: {' '.join(str(said).split())[:200]})"


def _wait(response: object) -> str:
    """How long a 429 asks to wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(response, "headers", {})
    found = parse_ratelimit_headers(headers)
    seconds = found.reset_in_seconds if found is not None else headers.get("retry-after")
    return f"{seconds} s" if seconds is not None and str(seconds).isdigit() else "some minutes"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
