"""Secrets kept out of what is printed, logged, written and uploaded.

A secret is the Hub's token of this machine and user, whatever it looks like; anything of the shape of a well-known
kind of token or key; and a name and password in a URL.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
# A shorter token would be a word that texts hold anyway.
LEAST = 8

# Hugging Face, GitHub, OpenAI and Anthropic, AWS, Google, Slack, GitLab, PyPI, JWT: too long to be words of a tokenizer.
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9_]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}"
    r"|sk-(?:[a-z]+-)*[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{20,}"
    r"|glpat-[A-Za-z0-9_-]{20,}|pypi-[A-Za-z0-9_-]{40,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# user:password@ or token@ of a URL; of one slash, as paths fold two. Bounded, so that a long word costs no more than its length.
CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]{0,20}:/{1,2})(?P<who>[^\s/@'\"<>]{1,1000})@", re.IGNORECASE)
# Environment variables that huggingface_hub reads a token from.
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN")


def known_secrets() -> list[str]:
    """The tokens that huggingface_hub would find here, longest first. Asks no network, as its own `get_token` may."""
    from huggingface_hub import constants

    found = {os.environ.get(name, "").strip() for name in VARIABLES}
    for path, pattern in ((constants.HF_TOKEN_PATH, r"\S+"), (constants.HF_STORED_TOKENS_PATH, r"(?m)(?<== )\S+$")):
        try:
            found.update(re.findall(pattern, Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue
    return sorted((secret for secret in found if len(secret) >= LEAST), key=len, reverse=True)


def scrub(text: str, secrets: list[str] | None = None) -> str:
    """The text with every secret replaced by a mark.

    Args:
        text: what will be shown or written.
        secrets: tokens to look for beside the well-known shapes; None asks for this machine's.
    """
    for secret in known_secrets() if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    return CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", SHAPES.sub(HIDDEN, text))


def holds_secret(data: bytes, secrets: list[str]) -> bool:
    """Whether the bytes of a file hold a token or key; a URL's name and password count only where both are there."""
    text = data.decode("utf-8", errors="replace")
    if any(secret in text for secret in secrets) or SHAPES.search(text):
        return True
    return any(":" in match["who"] and match["scheme"].endswith("//") for match in CREDENTIALS.finditer(text))


@contextlib.contextmanager
def scrubbed_logs() -> Iterator[None]:
    """While the block runs, log records of every library are made without secrets, at any level and for any handler."""
    before, secrets = logging.getLogRecordFactory(), known_secrets()

    def make(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = before(*arguments, **named)
        try:
            said = record.getMessage()
        except (TypeError, ValueError):
            return record  # arguments that do not fit: logging itself reports those, and shows none of them
        clean = scrub(said, secrets)
        if clean != said:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[1] is not None:
            # A traceback's text is made by the handler, past this place.
            record.exc_text = scrub(logging.Formatter().formatException(record.exc_info), secrets)
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
