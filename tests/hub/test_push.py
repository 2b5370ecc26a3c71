"""`retrofit push` against a Hub on this machine that really stores: what arrives, what is refused, what goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from retrofit.cli import main
from retrofit.hub import patience
from tests.hub_stand_in import Account, StandIn, in_place_of_the_hub

# Shaped like tokens, in halves: no scanner of repositories need look at them.
ANN, READER, BOB = ("hf_" + name + "Q7" * 10 for name in ("ann", "reader", "bob"))
REPO = "ann/llada-flex"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, with ann logged in; waiting takes no time."""
    accounts = {
        ANN: Account("ann", organisations={"lab": "write"}),
        READER: Account("ann", "read"),
        BOB: Account("bob"),
    }
    with StandIn(accounts, part=3000) as hub:
        in_place_of_the_hub(hub, ANN, monkeypatch)
        yield hub


@pytest.fixture
def slept(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model: two shards, of 4,104 bytes and more, and small files."""
    folder = tmp_path / "exported"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    shards = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.randn(1024 * number, generator=draw)}, folder / name)
        shards[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text(json.dumps({"model_type": "flexmdm", "base_model": "GSAI-ML/LLaDA-8B-Base"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: GSAI-ML/LLaDA-8B-Base\n---\n# A model\n")
    (folder / "modeling.py").write_text("import torch\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(folder: Path, *options: str) -> int:
    return main(["push", str(folder), REPO, "--yes", *options])


def error_line(capsys: Any) -> str:
    said = capsys.readouterr()
    assert ANN not in said.out + said.err
    last = said.err.splitlines()[-1]
    assert last.startswith("retrofit: error: ")
    return last


# -------------------------------------------------------------------------------------------------------- round trips


def test_what_was_pushed_is_downloaded_byte_for_byte(hub: StandIn, folder: Path, tmp_path: Path, capsys: Any) -> None:
    before = contents(folder)
    assert push(folder) == 0
    clean = snapshot_download(REPO, local_dir=tmp_path / "clean", endpoint=hub.endpoint, token=ANN)
    downloaded = {name: content for name, content in contents(Path(clean)).items() if not name.startswith(".")}
    assert downloaded == before == contents(folder) == hub.files(REPO)
    assert hub.repositories[REPO].private
    said = capsys.readouterr()
    for name in before:
        assert re.search(rf"{re.escape(name)}  \(new\)", said.out)
    assert "login     ann" in said.out and "private, will be made" in said.out and "7, 12.7 kB" in said.out
    assert "downloaded again and equal" in said.out and "/tree/main" in said.out
    assert ANN not in said.out + said.err


def test_large_files_went_in_parts_and_small_ones_in_the_commit(hub: StandIn, folder: Path) -> None:
    assert push(folder) == 0
    assert len(hub.asked("PUT /lfs/.*/part/")) == 2 + 3 and len(hub.asked("POST /lfs/.*/complete")) == 2
    assert len(hub.repositories[REPO].branches["main"]) == 2  # the Hub's own first commit, and ours


def test_the_command_line_alone_pushes_and_shows_no_address_that_is_signed(
    hub: StandIn, folder: Path, tmp_path: Path
) -> None:
    hub.fail("PUT /lfs/", 503)
    (tmp_path / "token").write_text(ANN)
    told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | told
    command = [sys.executable, "-m", "retrofit", "push", str(folder), REPO, "--yes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert hub.files(REPO) == contents(folder) and hub.faults[0].times == 0
    assert not re.search(f"signature|{ANN}", done.stdout + done.stderr)


def test_a_name_alone_is_in_ones_own_account_and_an_organisation_can_be_named(hub: StandIn, folder: Path) -> None:
    assert main(["push", str(folder), "flex", "--yes"]) == 0
    assert main(["push", str(folder), "lab/flex", "--yes", "--public"]) == 0
    assert hub.repositories["ann/flex"].private and not hub.repositories["lab/flex"].private


def test_a_branch_holds_its_step_and_main_stays_as_it_is(hub: StandIn, folder: Path) -> None:
    hub.create(REPO)
    hub.add(REPO, "main", {"config.json": b"{}", "model.safetensors": b"another"})
    assert push(folder, "--branch", "step-00001000") == 0
    assert hub.files(REPO, "step-00001000") == contents(folder)
    assert hub.files(REPO) == {"config.json": b"{}", "model.safetensors": b"another"}


def test_the_message_is_that_of_the_run_or_the_one_given(hub: StandIn, folder: Path, tmp_path: Path) -> None:
    step = tmp_path / "runs" / "toy" / "checkpoints" / "step-00001000"
    step.parent.mkdir(parents=True)
    folder.rename(step)
    assert push(step) == 0
    assert push(step, "--branch", "other", "--message", "a better one") == 0
    titles = [hub.repositories[REPO].branches[name][-1].title for name in ("main", "other")]
    assert titles == ["toy: step 1000", "a better one"]


def test_a_checkpoints_training_state_stays_here(hub: StandIn, folder: Path, capsys: Any) -> None:
    for name in ("training_state.json", "training_state-00001-of-00001.safetensors", "rng.safetensors"):
        (folder / name).write_bytes(b"never read")
    wanted = {name for name in contents(folder) if not name.startswith(("training", "rng"))}
    assert push(folder) == 0
    assert set(hub.files(REPO)) == wanted
    assert "training_state.json  (stays here)" in capsys.readouterr().out


def test_the_same_again_uploads_and_commits_nothing(hub: StandIn, folder: Path, capsys: Any) -> None:
    assert push(folder) == 0
    hub.requests.clear()
    assert push(folder) == 0
    assert hub.asked("PUT|POST (?!/api/validate-yaml)") == []
    assert "(new)" not in capsys.readouterr().out.partition("pushed")[2]


def test_another_model_in_the_branch_is_refused_and_replaced_on_request(
    hub: StandIn, folder: Path, capsys: Any
) -> None:
    hub.create(REPO)
    old = hub.add(REPO, "main", {"config.json": b"{}", "model.safetensors": b"another"})
    assert push(folder) == 2
    assert "holds another model" in error_line(capsys) and hub.files(REPO)["model.safetensors"] == b"another"
    assert push(folder, "--overwrite") == 0
    assert hub.files(REPO) == contents(folder)  # the old model.safetensors is gone: transformers would have loaded it
    assert hub.repositories[REPO].branches["main"][-2] is old


def test_what_was_downloaded_is_loaded_and_sampled(hub: StandIn, toy: Path, capsys: Any) -> None:
    assert push(toy / "model", "--verify", "sample") == 0
    said = capsys.readouterr().out.partition("a sample of what was downloaded:\n")[2]
    assert len(said.splitlines()) > 1 and "downloaded again and equal" in said


def test_digests_alone_can_be_believed(hub: StandIn, folder: Path) -> None:
    assert push(folder, "--verify", "digests") == 0
    assert hub.asked("(GET|HEAD) .*/resolve/") == [] and hub.files(REPO) == contents(folder)


# ---------------------------------------------------------------------------------------------------- asking, refusing


def test_without_yes_and_without_anybody_nothing_is_sent(hub: StandIn, folder: Path, capsys: Any) -> None:
    assert main(["push", str(folder), REPO]) == 2
    assert "--yes" in error_line(capsys) and REPO not in hub.repositories


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("", False), ("no", False)])
def test_who_is_asked_decides(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, goes: bool
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert main(["push", str(folder), REPO]) == 0
    assert (REPO in hub.repositories) is goes


@pytest.mark.parametrize(
    "arguments", [["--token", BOB], [f"--token={BOB}"], ["--message", f"with {BOB}"], ["--branch", BOB]]
)
def test_a_token_in_a_flag_is_refused_and_pointed_to_the_login(
    hub: StandIn, folder: Path, capsys: Any, arguments: list[str]
) -> None:
    assert push(folder, *arguments) == 2
    said = error_line(capsys)
    assert "hf auth login" in said and BOB not in said and hub.requests == []


def test_without_a_login_the_way_to_one_is_said(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(folder) == 2
    assert "hf auth login" in error_line(capsys) and hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        ("hf_" + "unknown0" * 4, REPO, "(401); run `hf auth login`"),
        (READER, REPO, "may only read"),
        (BOB, REPO, "bob, who is logged in, may not make repositories of ann"),
        (ANN, "bob/model", "ann, who is logged in, may not make repositories of bob (only of: ann, lab)"),
        (ANN, "bob/open", "ann, who is logged in, may not write to bob/open (403)"),
        (ANN, "ann/a/b", "no name of a repository"),
        (ANN, "ann/open", "is public; say --public"),
    ],
)
def test_who_may_not_write_there_is_told_before_anything_is_sent(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, token: str, repo_id: str, said: str
) -> None:
    hub.create("bob/open", private=False)
    hub.create("ann/open", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(folder), repo_id, "--yes"]) == 2
    line = error_line(capsys)
    assert said in line and token not in line
    assert hub.asked("PUT|POST (?!/api/validate-yaml)") == [] and len(hub.repositories) == 2


def test_public_is_not_taken_for_done_where_the_repository_is_private(hub: StandIn, folder: Path, capsys: Any) -> None:
    hub.create(REPO)
    assert push(folder, "--public") == 2
    assert "is private; leave --public out" in error_line(capsys)


SECRETS = {
    "Hub": "hf_" + "Ab3" * 8, "GitHub": "ghp_" + "Ab3" * 12, "GitHub app": "ghs_" + "Ab3" * 12,
    "fine-grained": "github_pat_" + "11AB" * 8, "OpenAI": "sk-proj-" + "Ab3" * 10, "Anthropic": "sk-ant-" + "Ab3" * 10,
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE", "AWS secret": "aws_secret_access_key = " + "wJalr/XUt+" * 4,
    "Google": "AIza" + "SyD-9tSr" * 4 + "abc", "Slack": "xoxb-" + "123456789012345678", "W&B": "wandb_v1_" + "Ab3" * 9,
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----", "RSA": "-----BEGIN RSA PRIVATE KEY-----",
    "variable": "correct horse battery",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where"),
    [(kind, "README.md") for kind in SECRETS]
    + [("Hub", where) for where in ("config.json", "modeling.py", "model-00001-of-00002.safetensors")],
)
def test_a_secret_in_a_file_is_refused_before_any_request(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, where: str, kind: str
) -> None:
    monkeypatch.setenv("MY_PASSWORD", SECRETS["variable"])
    path, secret = folder / where, SECRETS[kind]
    if path.suffix == ".safetensors":
        save_file({"w1": torch.zeros(3)}, path, metadata={"note": secret})
    elif path.suffix == ".json":
        path.write_text(json.dumps({"a": 1, "b": secret}, indent=1))
    else:
        path.write_text(path.read_text() + f"# {secret}\n")
    line = {"README.md": 6, "config.json": 3, "modeling.py": 2}.get(where, 1)
    assert push(folder) == 2
    said = error_line(capsys)
    assert f"{path}:{line}: holds something shaped like a secret" in said and secret not in said
    assert hub.requests == []


def test_the_login_in_a_file_is_refused_whatever_its_shape(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("of no known shape")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (folder / "README.md").write_text("a\nb of no known shape\n")
    assert push(folder) == 2
    assert f'{folder / "README.md"}:2: holds something shaped like a secret ("of ...")' in error_line(capsys)


def _write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def _link(name: str, target: str) -> Any:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


ZIP, PICKLE = b"PK\x03\x04" + bytes(30), b"\x80\x04\x95" + bytes(30)
SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_write("pytorch_model.bin", ZIP), "pytorch_model.bin: is a pickled file by its name"),
        (_write("optimizer.pt", PICKLE), "optimizer.pt: is a pickled file by its name"),
        (_write("arrays.npy", b""), "arrays.npy: is a pickled file by its name"),
        (_write("config.json", ZIP), "config.json: is a pickled file or an archive by its content"),
        (_write("README.md", PICKLE), "README.md: is a pickled file or an archive by"),
        (_write("tokenizer.json", b"(dp0\nS'a'\np1\nI1\ns."), "tokenizer.json: its content is not what its name says"),
        (_write("modeling.py", b"c__builtin__\neval\n(S'1'\ntR."), "modeling.py: its content is not what its"),
        (_write("img.png", b"no picture"), "img.png: its content is not what its name says (is not a PNG picture)"),
        (_write(SHARD, ZIP), f"{SHARD}: does not begin like safetensors"),
        (_write(SHARD, PICKLE), f"{SHARD}: does not begin like safetensors"),
        (lambda folder: os.truncate(folder / SHARD, 4000), f"{SHARD}: its content is not what its name says (the file"),
        (_write(SHARD, b'\x0c\0\0\0\0\0\0\0{"a": "bcd"}'), f"{SHARD}: its content is not what its name says (a tensor"),
        (_write("hf_" + "Ab3" * 8 + ".png", b""), "hf_....png: holds something shaped like a secret in"),
        (_write(SHARD, b""), f"{SHARD}: does not begin like safetensors"),
        (_write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja: its content is not what its name says"),
        (_write("notes.txt", b"mine"), "notes.txt: is none of the files"),
        (_write("train.py", b""), "train.py: is none of the files"),
        (_write(".env", b"A=1"), ".env: is where secrets are kept"),
        (_write(".env.local", b""), ".env.local: is where secrets are kept"),
        (_write("id_rsa", b""), "id_rsa: is none of the files"),
        (lambda folder: (folder / "sub").mkdir(), "sub: is a directory"),
        (lambda folder: os.mkfifo(folder / "config.yaml"), "config.yaml: is not an ordinary file"),
        (_link("config.json", "../elsewhere.json"), "config.json: is a symbolic link"),
        (_link("generation_config.json", "config.json"), "generation_config.json: is a symbolic link"),
        (_link("img", ".."), "img: is a symbolic link"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing, which model.safetensors.index.json names"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), f"{SHARD} is named by no"),
        (_write("model.safetensors", b"\2\0\0\0\0\0\0\0{}"), "model.safetensors is named by no"),
        (lambda folder: (folder / "config.json").unlink(), "holds weights but no config.json"),
        (lambda folder: [one.unlink() for one in folder.glob("model*")], "holds no model"),
        (_write("config.json", b'{"a": "/home/me/llada"}'), "config.json:1: holds a path of somebody's home (/h"),
        (_write("config.json", b'{"a": "C:\\\\Users\\\\me"}'), "config.json:1: holds a path of somebody's home"),
        (_write("README.md", b"# A\n\nin /Users/me/runs\n"), "README.md:3: holds a path of somebody's home"),
        (_write("config.json", b'{"base_model": "/data/llada"}'), 'config.json: base_model is "/data/llada"'),
        (_write("README.md", b"---\nlicense: Apache 2\n---\n"), 'README.md: license is "Apache 2"'),
        (_write("README.md", b"---\nbase_model: ../llada\n---\n"), 'README.md: base_model is "../llada"'),
        (_write("README.md", b"---\nbase_model:\n- /llada\n---\n"), 'README.md: base_model is "/llada"'),
        (_write("README.md", b"---\n- a\n---\n"), "README.md: the metadata at its top are not YAML"),
        (_write("README.md", b"---\na: [\n---\n"), "README.md: the metadata at its top are not YAML"),
    ],
)  # fmt: skip
def test_what_must_not_go_is_refused_before_any_request(
    hub: StandIn, folder: Path, capsys: Any, spoil: Any, said: str
) -> None:
    spoil(folder)
    assert push(folder) == 2
    errors = capsys.readouterr().err
    assert said in errors and "Traceback" not in errors
    assert hub.requests == []


def test_every_problem_is_named_at_once(hub: StandIn, folder: Path, capsys: Any) -> None:
    _write("a.bin", ZIP)(folder)
    _write(".env", b"")(folder)
    assert push(folder) == 2
    errors = capsys.readouterr().err
    assert "a.bin" in errors and ".env" in errors and errors.count("\n") == 2


@pytest.mark.parametrize(("make", "said"), [(lambda p: None, "no such directory"), (lambda p: p.mkdir(), "is a run")])
def test_a_run_is_not_a_model(hub: StandIn, tmp_path: Path, capsys: Any, make: Any, said: str) -> None:
    make(tmp_path / "run")
    if (tmp_path / "run").exists():
        (tmp_path / "run" / "checkpoints").mkdir()
    assert push(tmp_path / "run") == 2
    assert said in error_line(capsys)


def test_a_checkpoint_that_does_not_verify_is_refused(hub: StandIn, folder: Path, tmp_path: Path, capsys: Any) -> None:
    from tests.saves import save_now

    save_now(tmp_path / "step-00000002", contents(folder))
    assert push(tmp_path / "step-00000002") == 0
    path = tmp_path / "step-00000002" / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert push(tmp_path / "step-00000002", "--branch", "two") == 2
    assert f"{path}: is not the file that was saved" in error_line(capsys)
    path.unlink()
    assert push(tmp_path / "step-00000002", "--branch", "two") == 2
    assert "is missing" in error_line(capsys)
    assert list(hub.repositories[REPO].branches) == ["main"]


def test_a_card_that_only_the_hub_finds_invalid_is_refused_before_the_first_upload(
    hub: StandIn, folder: Path, capsys: Any
) -> None:
    (folder / "README.md").write_text("---\nlicense: gpl-9000\n---\n")
    assert push(folder) == 2
    line = error_line(capsys)
    assert "README.md: the Hub refuses its metadata" in line and '"license" must be one of' in line
    assert hub.asked("PUT|POST (?!/api/validate-yaml)") == []


# ----------------------------------------------------------------------------------------------- errors, and going on

WRITES = [
    "GET /api/whoami-v2", "POST /api/validate-yaml", "POST /api/repos/create", f"GET /api/models/{REPO}",
    f"POST /api/models/{REPO}/preupload", f"POST /{REPO}.git/info/lfs", "PUT /lfs/", "POST /lfs/.*/verify",
    "POST /lfs/.*/complete", f"POST /api/models/{REPO}/branch", f"POST /api/models/{REPO}/commit",
    f"GET /api/models/{REPO}/tree", f"GET /api/models/{REPO}/commits", f"HEAD /{REPO}/resolve", f"GET /{REPO}/resolve",
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "kind"),
    [(request, kind) for request in WRITES for kind in (503, "cut", "cut after", "cut amid")]
    + [("PUT /lfs/", status) for status in (408, 429, 500, 502, 504)],
)
def test_what_passes_is_tried_again(hub: StandIn, folder: Path, capsys: Any, request_: str, kind: int | str) -> None:
    hub.fail(request_, kind, times=2)
    assert push(folder, "--branch", "step-00000001") == 0
    assert hub.faults[0].times < 2  # it did happen
    assert hub.files(REPO, "step-00000001") == contents(folder) and hub.repositories[REPO].private
    commits = hub.repositories[REPO].branches["step-00000001"]
    assert [one.title for one in commits] == ["initial commit", "exported"]
    assert ANN not in "".join(capsys.readouterr())


def test_the_pause_that_the_hub_asks_for_is_kept(hub: StandIn, folder: Path, slept: list[float], capsys: Any) -> None:
    hub.fail("GET /api/whoami-v2", 429, Retry_After="7")
    assert push(folder) == 0
    assert 7 in slept and "asks for a pause (429); trying again in 7 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_", "kind", "said"),
    [
        ("POST /api/repos/create", 401, "(401); run `hf auth login`"),
        ("POST /api/repos/create", 403, "forbids it to your login (403)"),
        (f"POST /{REPO}.git/info/lfs", 403, "forbids it to your login (403)"),
        ("PUT /lfs/", 403, "forbids it to your login (403)"),
        (f"POST /api/models/{REPO}/commit", 409, "something else changed there meanwhile (409)"),
        (f"POST /api/models/{REPO}/commit", 412, "something else changed there meanwhile (412)"),
        (f"POST /api/models/{REPO}/commit", 413, "the Hub answers 413"),
        (f"POST /api/models/{REPO}/commit", 503, "the Hub answers 503"),
        (f"POST /api/models/{REPO}/commit", "cut", "no connection to http://127.0.0.1"),
        ("PUT /lfs/", 429, "asks for a pause (429)"),
        ("PUT /lfs/", "cut", "no connection to http://127.0.0.1"),
    ],
)
def test_what_does_not_pass_is_told_in_one_line_and_the_same_command_goes_on(
    hub: StandIn, folder: Path, capsys: Any, request_: str, kind: int | str, said: str
) -> None:
    before = contents(folder)
    hub.fail(request_, kind, times=10**6)
    assert push(folder) == 2
    line = error_line(capsys)
    assert line.startswith(f"retrofit: error: {folder}: push to {REPO}, branch main, stopped: ") and said in line
    assert line.endswith("the same command goes on where it stopped") and "signature" not in line
    assert contents(folder) == before and hub.files(REPO) == {} if REPO in hub.repositories else True
    hub.faults.clear()
    assert push(folder) == 0
    assert hub.files(REPO) == before


def test_a_push_that_was_cut_goes_on_with_the_files_that_are_not_there_yet(
    hub: StandIn, folder: Path, capsys: Any
) -> None:
    second = hashlib.sha256((folder / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    hub.fail(f"PUT /lfs/{second}", "cut", times=10**6)
    assert push(folder, "--branch", "step-00000001") == 2
    assert len(hub.store) == 1 and hub.files(REPO, "main") == {}
    hub.faults.clear()
    hub.requests.clear()
    assert push(folder, "--branch", "step-00000001") == 0
    assert len(hub.asked("PUT /lfs/")) == len(hub.asked(f"PUT /lfs/{second}")) == 3
    assert hub.files(REPO, "step-00000001") == contents(folder)


@pytest.mark.parametrize("request_", ["GET /api/whoami-v2", "POST /api/validate-yaml"])
def test_a_preflight_that_fails_says_that_nothing_was_sent(
    hub: StandIn, folder: Path, capsys: Any, request_: str
) -> None:
    hub.fail(request_, "cut", times=10**6)
    assert push(folder) == 2
    line = error_line(capsys)
    assert f"{folder}: not pushed to {REPO}: no connection" in line and line.endswith("nothing was sent")
    assert len(hub.asked(request_)) == len(patience.WAITS) + 1


def test_somebody_elses_commit_in_between_is_not_overwritten(hub: StandIn, folder: Path, capsys: Any) -> None:
    hub.create(REPO)

    def meanwhile(request: str) -> None:
        if request.startswith("POST") and "/commit/" in request and len(hub.repositories[REPO].branches["main"]) == 1:
            hub.add(REPO, "main", {"config.json": b"{}"})

    hub.before = meanwhile
    assert push(folder) == 2
    assert "something else changed there meanwhile (412)" in error_line(capsys)
    assert hub.files(REPO) == {"config.json": b"{}"}


def test_a_commit_that_comes_to_pass_after_its_failure_was_told_is_found(hub: StandIn, folder: Path) -> None:
    def late(request: str) -> None:
        if len(hub.asked(f"POST /api/models/{REPO}/commit")) == 2 and request.startswith("POST"):
            hub.add(REPO, "main", contents(folder), title="ours, late")

    hub.fail(f"POST /api/models/{REPO}/commit", 504)
    hub.before = late
    assert push(folder) == 0
    assert [commit.title for commit in hub.repositories[REPO].branches["main"]] == ["initial commit", "ours, late"]


def test_where_the_hub_must_not_be_asked_that_is_said(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(folder) == 2
    assert "HF_HUB_OFFLINE is set" in error_line(capsys) and hub.requests == []


@pytest.mark.parametrize("verify", ["download", "digests"])
def test_a_hub_that_keeps_something_else_is_found_out(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    def spoil(request: str) -> None:
        if "/tree/" in request and REPO in hub.repositories:
            for name, blob in hub.repositories[REPO].branches["main"][-1].files.items():
                if name == SHARD:
                    blob.content = bytes(len(blob.content))

    hub.before = spoil
    assert push(folder, "--verify", verify) == 2
    line = error_line(capsys)
    assert "pushed as commit" in line and f"the Hub has other files than were pushed: {SHARD}" in line


def test_a_file_that_comes_back_changed_under_the_right_digest_is_found_out(
    hub: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil = lambda self: "0" * 64 if self.content[:1] == b"X" else hashlib.sha256(self.content).hexdigest()  # noqa: E731
    right = hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()

    def meanwhile(request: str) -> None:
        if request.startswith("HEAD") and SHARD in request:
            blob = hub.repositories[REPO].branches["main"][-1].files[SHARD]
            blob.content = b"X" + blob.content[1:]

    monkeypatch.setattr("tests.hub_stand_in.Blob.sha256", property(lambda self: spoil(self).replace("0" * 64, right)))
    hub.before = meanwhile
    assert push(folder) == 2
    assert f"{SHARD} came back with SHA-256" in error_line(capsys)
