"""Finds strings shaped like access tokens and masks them, so that none reaches a file, a log or a message."""

import os
import re

# The Hub's user and organisation tokens, W&B's keys and GitHub's tokens, by their published prefixes.
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|api_org_|wandb_v1_|ghp_|github_pat_)(?=[A-Za-z0-9_-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]+"
)
# W&B's older keys: just 40 hexadecimal digits. A git commit looks the same, so the caller says where one may be.
_HEXADECIMAL = re.compile(r"\s*[0-9a-fA-F]{40}\s*")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def holds_token(text: str, *, may_be_commit: bool = False) -> bool:
    """Whether `text` holds something shaped like an access token; `may_be_commit` lets a bare commit id pass."""
    return bool(_PREFIXED.search(text)) or (not may_be_commit and bool(_HEXADECIMAL.fullmatch(text)))


def mask_tokens(text: str) -> str:
    """`text` with all prefixed tokens, and the values of the token variables of this environment, cut to stubs."""
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        text = text.replace(value, mask(value))
    return _PREFIXED.sub(lambda match: mask(match.group()), text)


def mask(token: str) -> str:
    """The first three characters and dots: enough to recognise which token it is, not enough to use it."""
    return token.strip()[:3] + "..."
