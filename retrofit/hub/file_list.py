"""Which files of a folder may go to the Hub: an explicit list, each file looked into, and a refusal of anything else.

Nothing is asked of the network here. A file goes by its name *and* by its content: safetensors must begin like
safetensors, JSON must be JSON, Python must be Python. So a pickled file is refused whatever it is called.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

import retrofit
from retrofit.checkpoints import checkpoint
from retrofit.credentials import find_secrets

_WEIGHTS = re.compile(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX_SUFFIX = ".safetensors.index.json"
_JSON = {
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", f"model{_INDEX_SUFFIX}",
    f"adapter_model{_INDEX_SUFFIX}",
}  # fmt: skip
_TEXT = {"README.md", "LICENSE", "chat_template.jinja", "merges.txt"}
_CODE = {path.name for path in (Path(retrofit.__file__).parent / "flexmdm").glob("*.py")}
_PICTURE = re.compile(r"(img/)?[\w-]+\.png")
# What a run's checkpoint holds beside the model. Going on with the training needs it; using the model does not.
_STAYS = re.compile(r"manifest\.json|training_state\.json|training_state-\d{5}-of-\d{5}\.safetensors|rng\.safetensors")
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".distcp", ".mar"}
_PICKLE_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", *(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5)))

# A path below somebody's home names its owner.
_HOME_PATH = re.compile(r"(?<![\w.])(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[^\s/\\\"']+|(?<![\w./])/root/[\w.]")
_LONGEST_HEADER = 100_000_000  # bytes; the library that reads safetensors has the same bound
_VOCABULARY = {"tokenizer.json", "vocab.json", "merges.txt"}  # pieces of any text, a path's too
_BASE_FIELDS = ("base_model", "base_model_name_or_path", "_name_or_path")
_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


@dataclass(frozen=True)
class File:
    """A file that is to be pushed.

    Attributes:
        name: path in the repository. size: bytes.
        sha256, blob_id: hexadecimal digests, by which the Hub names large and small files; the second is git's.
    """

    path: Path
    name: str
    size: int
    sha256: str
    blob_id: str


@dataclass(frozen=True)
class FileList:
    """What is pushed of a folder, and the names of the known files that are not."""

    files: tuple[File, ...]
    stays: tuple[str, ...]


def list_files(
    folder: Path, secrets: Iterable[str] = (), on_bytes: Callable[[int], None] = lambda count: None
) -> FileList:
    """Looks at everything in `folder`.

    Args:
        secrets: values that no file may hold, such as the saved login.
        on_bytes: called with the count of each block of a file that was read.

    Raises:
        ValueError: there is no model in it, or something that must not be pushed; a line for each problem.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory")
    if (folder / "checkpoints").is_dir() or (folder / "final").is_dir():
        raise ValueError(f"{folder}: is a run; push its final/, one of its checkpoints, or what `retrofit export` made")
    going, stays, problems = [], [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and _STAYS.fullmatch(name):
            stays.append(name)
        elif problem := _problem_of_name(name, mode):
            problems.append(f"{path}: {problem}")
        elif stat.S_ISREG(mode):
            going.append(path)
    for path in going:
        problems += [f"{path}{problem}" for problem in _problems_of_content(path, set(secrets))]
    problems += [f"{folder}: {problem}" for problem in _problems_of_shards(folder, {path.name for path in going})]
    if problems:
        raise ValueError("\n".join(problems))
    return FileList(tuple(_digest(folder, path, on_bytes) for path in going), tuple(stays))


def _problem_of_name(name: str, mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return "is a symbolic link, which may lead anywhere; put the file itself in its place"
    if stat.S_ISDIR(mode):
        return None if name == "img" else "is a directory, which a model on the Hub has none of; export the model first"
    if not stat.S_ISREG(mode):
        return "is not an ordinary file; move it elsewhere"
    if Path(name).suffix in _PICKLED:
        return (
            "is a pickled file by its name, and those run code when loaded; export safetensors, and move it elsewhere"
        )
    if Path(name).name.startswith(".env"):
        return "is where secrets are kept; move it elsewhere"
    if find_secrets(name):
        return "holds something shaped like a secret in its name"
    if name in _JSON | _TEXT | _CODE or _WEIGHTS.fullmatch(name) or _PICTURE.fullmatch(name):
        return None
    return "is none of the files that a model on the Hub is made of; move it elsewhere"


def _problems_of_content(path: Path, secrets: set[str]) -> Iterator[str]:
    """What is wrong inside one file; each begins with the colon, or with a line number, that follows the path."""
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(_PICKLE_MAGIC) and path.suffix != ".safetensors":
            yield ": is a pickled file or an archive by its content, whatever its name; export safetensors"
            return
        if path.suffix == ".safetensors":
            length = int.from_bytes(start, "little")
            size = path.stat().st_size
            content = file.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
            if not content.startswith(b"{"):
                yield ": does not begin like safetensors; it may be pickled, or cut short; export it again"
                return
        else:
            content = start + file.read()
    try:
        text = content.decode("latin-1" if path.suffix == ".png" else "utf-8")
        if path.suffix == ".png" and not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("is not a PNG picture")
        parsed = json.loads(text) if path.suffix in (".json", ".safetensors") else None
        if path.suffix == ".safetensors" and 8 + length + _data_size(parsed) != size:
            raise ValueError(f"the file has {size} bytes, its header says {8 + length + _data_size(parsed)}")
        if path.suffix == ".py":
            ast.parse(text)
    except (ValueError, SyntaxError, RecursionError) as error:
        yield f": its content is not what its name says ({str(error).splitlines()[0] if str(error) else 'nested'})"
        return
    for line, secret in find_secrets(text, secrets):
        yield f':{line}: holds something shaped like a secret ("{secret}"); take it out, and revoke it if it was real'
    for match in _HOME_PATH.finditer("" if path.name in _VOCABULARY else text):
        line = text.count("\n", 0, match.start()) + 1
        yield f":{line}: holds a path of somebody's home ({match.group()}); take it out"
    if path.name in ("config.json", "adapter_config.json"):
        yield from _problems_of_base(parsed if isinstance(parsed, dict) else {})
    if path.name == "README.md":
        yield from _problems_of_card(path)


def _data_size(header: Any) -> int:
    """Bytes of the tensors of a safetensors file. Raises ValueError if the header does not say."""
    try:
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return max((int(end) for end in ends), default=0)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError("a tensor has no offsets") from error


def _problems_of_base(fields: dict[str, Any]) -> Iterator[str]:
    for field in _BASE_FIELDS:
        values = fields.get(field) or []
        for value in values if isinstance(values, list) else [values]:
            try:
                validate_repo_id(value)
            except HFValidationError:
                yield f": {field} is {_quoted(value)}, which nobody else can load; name a repository of the Hub"


def _problems_of_card(path: Path) -> Iterator[str]:
    """The fields that the Hub refuses most often; the Hub's own validator sees the card too, when it is asked."""
    try:
        fields = metadata_load(path) or {}
    except Exception as error:  # the YAML reader's own kinds, of whichever library reads it
        yield f": the metadata at its top are not YAML ({' '.join(str(error).split())})"
        return
    yield from _problems_of_base(fields)
    licence = fields.get("license", "other")
    if not isinstance(licence, str) or not _LICENSE.fullmatch(licence):
        yield f": license is {_quoted(licence)}, not an identifier such as apache-2.0"


def _quoted(value: object) -> str:
    return f'"{" ".join(str(value).split())[:80]}"'


def _problems_of_shards(folder: Path, names: set[str]) -> Iterator[str]:
    weights = {name for name in names if name.endswith(".safetensors")}
    if not weights:
        yield "holds no model: no model.safetensors, no adapter_model.safetensors"
    if weights and not names & {"config.json", "adapter_config.json"}:
        yield "holds weights but no config.json"
    for stem in ("model", "adapter_model"):
        index = folder / f"{stem}{_INDEX_SUFFIX}"
        present = {name for name in weights if name.startswith(f"{stem}-") or name == f"{stem}.safetensors"}
        named = present if f"{stem}.safetensors" in present and not index.is_file() else _named_by(index)
        for name in sorted(named - present):
            yield f"{name} is missing, which {index.name} names (incomplete download?)"
        for name in sorted(present - named):
            yield f"{name} is named by no {index.name}, so nobody would load it"


def _named_by(index: Path) -> set[str]:
    """The weight files of an index. An unreadable one is told of as a file."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {name for name in named if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _digest(folder: Path, path: Path, on_bytes: Callable[[int], None]) -> File:
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            blob.update(block)
            on_bytes(len(block))
    return File(path, path.relative_to(folder).as_posix(), size, sha256.hexdigest(), blob.hexdigest())


def check_manifest(folder: Path, files: Iterable[File]) -> None:
    """Compares with the manifest of a checkpoint, where the folder has one.

    Raises:
        ValueError: a file is missing or is not the one that was saved.
    """
    if not (folder / checkpoint.MANIFEST).is_file():
        return
    try:
        entries = checkpoint.read_manifest(folder)["files"]
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    found = {file.name: file.sha256 for file in files}
    for name, entry in entries.items():
        if not _STAYS.fullmatch(name) and found.get(name) != entry["sha256"]:
            what = "is not the file that was saved" if name in found else "is missing"
            raise ValueError(f"{folder / name}: {what}, by {checkpoint.MANIFEST}; see `retrofit verify`")
