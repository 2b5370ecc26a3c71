"""Finds strings shaped like access tokens and masks them, so that none reaches a file, a log or a message."""

import os
import re
from collections.abc import Iterable

# Access tokens by their published prefixes: of the Hub, W&B, GitHub, GitLab, OpenAI and Anthropic, Slack, PyPI, npm;
# then those of a fixed length: of AWS and Google.
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_|api_org_|wandb_v1_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abeoprs]-|pypi-|npm_)"
    r"(?=[A-Za-z0-9_-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]+|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[A-Za-z0-9_-]{35})"
)
_PRIVATE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|(?i:aws_secret_access_key|aws_session_token)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}"
)
# W&B's older keys: just 40 hexadecimal digits. A git commit looks the same, so the caller says where one may be.
_HEXADECIMAL = re.compile(r"\s*[0-9a-fA-F]{40}\s*")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL")
_SHORTEST_SECRET = 12  # characters; a shorter value of a variable, such as "false", may stand anywhere


def holds_token(text: str, *, may_be_commit: bool = False) -> bool:
    """Whether `text` holds something shaped like an access token; `may_be_commit` lets a bare commit id pass."""
    return bool(_PREFIXED.search(text)) or (not may_be_commit and bool(_HEXADECIMAL.fullmatch(text)))


def mask_tokens(text: str) -> str:
    """`text` with all prefixed tokens, and the values of the token variables of this environment, cut to stubs."""
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        text = text.replace(value, mask(value))
    return _PREFIXED.sub(lambda match: mask(match.group()), text)


def find_secrets(text: str, values: Iterable[str] = ()) -> list[tuple[int, str]]:
    """Where `text` holds a token, a private key, one of `values`, or what an environment variable of a secret has.

    Args:
        values: further secrets, such as the saved login.

    Returns:
        (line number from 1, what was found, masked), in order.
    """
    known = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)} | set(values)
    found = {(match.start(), match.group()) for pattern in (_PREFIXED, _PRIVATE) for match in pattern.finditer(text)}
    found |= {(text.find(value), value) for value in known if len(value) >= _SHORTEST_SECRET and value in text}
    return [(text.count("\n", 0, start) + 1, mask(secret)) for start, secret in sorted(found)]


def mask(token: str) -> str:
    """The first three characters and dots: enough to recognise which token it is, not enough to use it."""
    return token.strip()[:3] + "..."
