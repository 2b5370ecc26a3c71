"""`retrofit push`: a folder's model to the Hub, looked at before, and read back after.

After a push the branch holds exactly the files that were listed: what was there before and is not listed goes in the
same commit, on request only, and stays in the repository's history. Large files are uploaded one by one before that
commit and are known to the Hub by their SHA-256, so that a push which failed goes on where it stopped, and until the
commit nobody sees anything of it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    HFValidationError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from retrofit.checkpoints import checkpoint
from retrofit.credentials import find_secrets

from .file_list import File, check_manifest, list_files
from .patience import HubError, one_line, patiently

Verify = Literal["download", "digests", "sample"]

MAIN = "main"
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WRITERS = {"admin", "write", "contributor"}  # roles in an organisation that may make repositories
_SMALL = 1_000_000  # bytes; smaller files take no time that would have to be told
_OF_THE_HUB = {".gitattributes"}  # which the Hub itself puts into a new repository


@dataclass(frozen=True)
class Target:
    """What preflight found where the push is to go.

    Attributes:
        user: who is logged in. repo_id: owner/name.
        exists: whether the repository does. head: commit of the branch, None without one.
        files: what the branch holds, by path.
    """

    user: str
    repo_id: str
    branch: str
    exists: bool
    head: str | None
    files: Mapping[str, RepoFile]


def push(
    folder: Path,
    repo_id: str,
    *,
    branch: str = MAIN,
    public: bool = False,
    overwrite: bool = False,
    message: str | None = None,
    yes: bool = False,
    verify: Verify = "download",
) -> str | None:
    """Pushes `folder` and returns the commit, or None where the user said no.

    Args:
        folder: an exported model, an adapter, or a checkpoint with the whole model.
        repo_id: owner/name, or a name of one's own; made if there is none.
        public: of a repository that is made; a public one that exists is refused without it.
        overwrite: whether the branch may hold other files, which then go (but for the history).
        message: of the commit; None takes it from the folder's place in its run.
        yes: do not ask.
        verify: "download" reads every file back; "digests" believes what the Hub says of them; "sample" downloads,
            loads and samples.

    Raises:
        ValueError: something must not be pushed, or not there; nothing was sent.
        HubError: the Hub did not do it; how to go on is said.
    """
    hub_logging.set_verbosity_error()  # its warnings show addresses, and every new try that we tell of as well
    login = get_token()
    message = default_message(folder) if message is None else message
    _check_words(repo_id, branch, message, [login] if login else [])
    listed = list_files(folder, [login] if login else [], _progress(f"reading {folder}", _size(folder)))
    check_manifest(folder, listed.files)
    api = HfApi(library_name="retrofit")
    with _told(f"{folder}: not pushed to {repo_id}", "nothing was sent"):
        target = find_target(api, repo_id, branch)
        visible = _check_visibility(api, target, public)
        _check_card(api, listed.files)
    changed, surplus = difference(listed.files, target.files)
    _show(target, visible, listed.files, listed.stays, changed, surplus)
    if target.head is not None and (set(changed) & set(target.files) or surplus) and not overwrite:
        raise ValueError(
            f"{target.repo_id}: branch {branch} holds another model (see the list above); push to another --branch, or "
            f"say --overwrite (the history keeps what was there)"
        )
    if not yes and not _agreed():
        return None

    go_on = "nothing of it is visible yet and nothing here was changed; the same command goes on where it stopped"
    with _told(f"{folder}: push to {target.repo_id}, branch {branch}, stopped", go_on):
        if not target.exists:
            patiently(lambda: api.create_repo(target.repo_id, private=not public, exist_ok=True))
            _check_visibility(api, replace(target, exists=True), public)
        commit = _upload(api, target, listed.files, message)
    with _told(
        f"{target.repo_id}: pushed as commit {commit[:10]}, but not checked", "the same command checks it again"
    ):
        check(api, target.repo_id, commit, listed.files, verify)
    equal = "equal by the Hub's digests" if verify == "digests" else "downloaded again and equal"
    print(f"pushed    {api.endpoint}/{target.repo_id}/tree/{branch}\n          commit {commit}, {equal}", flush=True)
    return commit


def default_message(folder: Path) -> str:
    """`toy-gsm8k: step 1000` for a checkpoint of a run, else the folder's name."""
    folder = folder.resolve()
    step = checkpoint.step_of(folder)
    if step is not None and folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}: step {step}"
    return f"{folder.parent.name}: final" if folder.name == "final" else folder.name


# ------------------------------------------------------------------------------------------------------------ preflight


def _check_words(repo_id: str, branch: str, message: str, secrets: list[str]) -> None:
    for word in (repo_id, branch, message):
        if find_secrets(word, secrets):
            raise ValueError("a token stands in the command line; log in with `hf auth login` instead, and revoke it")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository (expected owner/name)") from error
    if not _BRANCH.fullmatch(branch) or branch.endswith(".lock") or ".." in branch:
        raise ValueError(f"{branch!r} is no name of a branch (letters, digits, ., _ and -, as in step-00001000)")
    if not message.strip():
        raise ValueError("the message of the commit is empty; leave --message out for one from the run")


def find_target(api: HfApi, repo_id: str, branch: str) -> Target:
    """Who is logged in, and what stands where the push is to go.

    Raises:
        ValueError: the login may not write there.
        HubError: the Hub does not say.
    """
    me = patiently(api.whoami)
    user = str(me["name"])
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"the login of {user} may only read; run `hf auth login` with a token that may write")
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    if not _found(lambda: api.repo_info(repo_id)):
        owner = repo_id.partition("/")[0]
        own = {str(org.get("name")): org.get("roleInOrg", "write") for org in me.get("orgs", [])} | {user: "admin"}
        if own.get(owner) not in _WRITERS:
            raise ValueError(
                f"{user}, who is logged in, may not make repositories of {owner} (only of: {', '.join(sorted(own))})"
            )
        return Target(user, repo_id, branch, False, None, {})
    try:
        patiently(lambda: api.auth_check(repo_id, write=True))
    except HubError as error:
        if error.status not in (401, 403, 404):
            raise
        raise ValueError(f"{user}, who is logged in, may not write to {repo_id} ({error.status})") from error
    refs = patiently(lambda: api.list_repo_refs(repo_id))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        return Target(user, repo_id, branch, True, None, {})
    return Target(user, repo_id, branch, True, heads[branch], files_at(api, repo_id, heads[branch]))


def _found(request: Callable[[], Any]) -> Any:
    try:
        return patiently(request)
    except HubError as error:
        if error.status == 404:
            return None
        raise


def _check_visibility(api: HfApi, target: Target, public: bool) -> str:
    """ "private" or "public". Raises ValueError where that of the repository is not the one asked for."""
    asked = "public" if public else "private"
    if not target.exists:
        return asked
    private = patiently(lambda: api.repo_info(target.repo_id)).private
    if private and public:
        raise ValueError(f"{target.repo_id} is private; leave --public out, or make it public in its settings first")
    if not private and not public:
        raise ValueError(f"{target.repo_id} is public; say --public if all may see this, or push to another repository")
    return asked


def _check_card(api: HfApi, files: Iterable[File]) -> None:
    """Asks the Hub's own validator before anything is uploaded. Raises ValueError where it refuses the card."""
    for file in files:
        if file.name == "README.md":
            complaints = patiently(partial(_complaints, api, file.path.read_text(encoding="utf-8")))
            if complaints:
                raise ValueError(f"{file.path}: the Hub refuses its metadata: {one_line('; '.join(complaints))}")


def _complaints(api: HfApi, card: str) -> list[str]:
    question = {"content": card, "repoType": "model"}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=question, headers=build_hf_headers())
    if answer.status_code == 400:
        return [str(error["message"]) for error in answer.json()["errors"]]
    hf_raise_for_status(answer)
    return []


def files_at(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """What a branch or commit holds, by path."""
    entries = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def is_same(file: File, entry: RepoFile) -> bool:
    """Whether the Hub's file has the same content, by the digest that it is stored under."""
    return entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == file.blob_id


def difference(files: Iterable[File], there: Mapping[str, RepoFile]) -> tuple[dict[str, File], list[str]]:
    """(files that are not there as they are here, paths that are there but not here)."""
    here = {file.name: file for file in files}
    changed = {name: file for name, file in here.items() if name not in there or not is_same(file, there[name])}
    return changed, sorted(set(there) - set(here) - _OF_THE_HUB)


def _show(
    target: Target,
    visible: str,
    files: Iterable[File],
    stays: Iterable[str],
    changed: Mapping[str, File],
    surplus: Iterable[str],
) -> None:
    files = list(files)
    state = "exists" if target.exists else "will be made"
    branch = "" if target.head else " (new)"
    print(f"login     {target.user}")
    print(f"to        {target.repo_id} ({visible}, {state}), branch {target.branch}{branch}")
    print(f"files     {len(files)}, {_bytes(sum(file.size for file in files))}")
    for file in files:
        state = "there already" if file.name not in changed else "differs" if file.name in target.files else "new"
        print(f"    {_bytes(file.size):>10}  {file.name}  ({state})")
    for name in surplus:
        print(f"    {'':>10}  {name}  (only there: would be removed)")
    for name in stays:
        print(f"    {'':>10}  {name}  (stays here)")
    sys.stdout.flush()


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to be asked; say --yes to push what is listed above")
    if input("push? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("nothing was sent")
    return False


# --------------------------------------------------------------------------------------------------------------- upload


def _upload(api: HfApi, target: Target, files: tuple[File, ...], message: str) -> str:
    """Uploads what is not there and commits it at once; returns the commit, or the branch's where all is there."""
    repo_id, branch = target.repo_id, target.branch
    head, there = target.head, target.files
    if head is None:
        head = _make_branch(api, repo_id, branch)
        there = files_at(api, repo_id, head)
    changed, surplus = difference(files, there)
    if not changed and not surplus:
        return head
    additions = [_addition(file) for file in changed.values()]
    for number, addition in enumerate(additions, 1):
        _tell("uploading", addition.path_in_repo, addition.upload_info.size, number, len(additions))
        patiently(partial(api.preupload_lfs_files, repo_id, [addition], revision=branch, free_memory=False))

    def committed() -> str | None:
        now = _head(api, repo_id, branch)
        return now if now != head and difference(files, files_at(api, repo_id, now)) == ({}, []) else None

    removals = [CommitOperationDelete(name) for name in surplus]
    return patiently(
        lambda: str(
            api.create_commit(
                repo_id, [*additions, *removals], commit_message=message, revision=branch, parent_commit=head
            ).oid
        ),
        committed,
    )


def _make_branch(api: HfApi, repo_id: str, branch: str) -> str:
    """Makes the branch where there is none, from the repository's first commit, which holds next to nothing."""
    if branch != MAIN:
        first = patiently(lambda: api.list_repo_commits(repo_id))[-1].commit_id
        patiently(lambda: api.create_branch(repo_id, branch=branch, revision=first, exist_ok=True))
    return _head(api, repo_id, branch)


def _head(api: HfApi, repo_id: str, branch: str) -> str:
    return str(patiently(lambda: api.repo_info(repo_id, revision=branch)).sha)


def _addition(file: File) -> CommitOperationAdd:
    addition = CommitOperationAdd(file.name, file.path)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known already: the client need not read it for that
    return addition


# ---------------------------------------------------------------------------------------------------------------- check


def check(api: HfApi, repo_id: str, commit: str, files: Iterable[File], verify: Verify = "download") -> None:
    """Compares what the Hub has with what was to be pushed.

    Raises:
        HubError: it differs, or the Hub does not give it.
    """
    files = list(files)
    changed, surplus = difference(files, files_at(api, repo_id, commit))
    if changed or surplus:
        raise HubError(f"the Hub has other files than were pushed: {', '.join([*changed, *surplus])}", None)
    if verify == "digests":
        return
    with tempfile.TemporaryDirectory(prefix="retrofit-push-") as scratch:
        for number, file in enumerate(files, 1):
            _tell("checking", file.name, file.size, number, len(files))
            download = partial(api.hf_hub_download, repo_id, file.name, revision=commit, local_dir=scratch)
            path = Path(patiently(download))
            found = checkpoint.sha256(path)
            if found != file.sha256:
                raise HubError(f"{file.name} came back with SHA-256 {found}, not {file.sha256}", None)
            if verify == "download":
                path.unlink()  # the disk needs to hold one file at a time
        if verify == "sample":
            _sample(Path(scratch))


def _sample(folder: Path) -> None:
    """Loads a model and prints what it writes after nothing."""
    from retrofit.generate import generate

    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    print("a sample of what was downloaded:", flush=True)
    if kind == "llada":
        generate(str(folder), prompts=[""], steps=16, answer_length=16)
    else:
        generate(str(folder), steps=16)


# -------------------------------------------------------------------------------------------------------------- telling


@contextmanager
def _told(what: str, how_to_go_on: str) -> Iterator[None]:
    """Puts into an error of the Hub what failed and how to go on, in one line."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{what}: {error}; {how_to_go_on}", error.status) from error


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _tell(doing: str, name: str, size: int, number: int, count: int) -> None:
    """A line on stderr before what may take long."""
    if size > _SMALL:
        print(f"{doing} {name} ({number} of {count}, {_bytes(size)})", file=sys.stderr, flush=True)


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Tells on stderr how far a long reading has come."""
    done, told_at = 0, time.monotonic()

    def on_bytes(count: int) -> None:
        nonlocal done, told_at
        done += count
        if time.monotonic() - told_at > 2:
            told_at = time.monotonic()
            print(f"{what}: {_bytes(done)} of {_bytes(total)}", file=sys.stderr, flush=True)

    return on_bytes
