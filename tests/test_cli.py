"""The command line: quick helps, one-line errors, exit codes, and what each verb hands on."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from retrofit import cli
from retrofit.environment import environment, git_state

VERBS = (
    "init",
    "preprocess",
    "train",
    "validate",
    "estimate",
    "verify",
    "check",
    "generate",
    "evaluate",
    "import-reference",
    "merge",
    "export",
    "push",
    "env",
)
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "peft")
RECIPE = """\
model: {init_from: llada}
data: {path: store}
objective: {name: flexmdm, window: 64}
optimizer: {learning_rate: 1e-4}
training: {output_dir: run, max_steps: 100, documents_per_step: 8, save_steps: 50}
"""


@pytest.fixture
def stub(monkeypatch):
    """Puts a function in place of a verb's own and returns the list of its calls."""

    def stub(module: str, name: str, error: BaseException | None = None) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []

        def called(*args, **kwargs):
            calls.append((args, kwargs))
            if error is not None:
                raise error

        replacement = types.ModuleType(module)
        setattr(replacement, name, called)
        monkeypatch.setitem(sys.modules, module, replacement)
        return calls

    return stub


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)])
def test_help_answers_at_once_with_an_example_and_without_heavy_imports(arguments):
    code = (
        "import sys; from retrofit.cli import main\n"
        f"try: main([*{arguments}, '--help'])\n"
        f"finally: print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1.5
    assert "example:\n  retrofit " in done.stdout
    assert done.stdout.endswith("HEAVY []\n")


def test_train_help_lists_the_fields_of_a_recipe(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "  optimizer.learning_rate: number\n      peak learning rate" in shown
    assert "  training.logging_steps: integer = 10\n" in shown


def test_both_doors_lead_to_the_same_command_line():
    for module, arguments in (("retrofit", ["train"]), ("retrofit.train", [])):
        command = [sys.executable, "-m", module, *arguments, "no-such-recipe.yaml"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == "retrofit: error: no-such-recipe.yaml: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["init", "toy", "--layers", "four"], "argument --layers: invalid int value: 'four'"),
        (["generate", "toy", "--promt", "a"], "unrecognized arguments: --promt a"),
        (["generate", "toy", "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["evaluate", "toy", "--task", "mood", "--data", "d"], "invalid choice: 'mood'"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_code_2(capsys, arguments, expected):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("retrofit: error: ") and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("store: no manifest"), 2, "store: no manifest"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), 2, "a.jsonl: No such file or directory"),
        (PermissionError(13, "Permission denied", "store"), 2, "store: Permission denied"),
        (OSError("disk is full"), 2, "disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError(name="lm_eval.api"),
            2,
            "package lm_eval is not installed; install it with: pip install 'retrofit[eval]'",
        ),
        (ModuleNotFoundError(name="other"), 2, "package other is not installed; install it with: pip install other"),
    ],
)
def test_users_errors_are_one_line_and_a_traceback_only_with_debug(stub, capsys, error, code, line):
    stub("retrofit.data.tiny", "init", error)
    assert cli.main(["init", "toy"]) == code
    assert capsys.readouterr().err == f"retrofit: error: {line}\n"
    with pytest.raises(type(error)):
        cli.main(["init", "toy", "--debug"])


def test_errors_of_ours_keep_their_traceback(stub):
    for error in (ModuleNotFoundError(name="retrofit.missing"), AssertionError("wrong")):
        stub("retrofit.data.tiny", "init", error)
        with pytest.raises(type(error)):
            cli.main(["init", "toy"])


def test_token_in_an_error_is_masked(stub, capsys, monkeypatch):
    token = "hf_" + "aB3" * 11
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    stub("retrofit.data.tiny", "init", ValueError(f"cannot reach {token} with 0123456789abcdef0123"))
    cli.main(["init", "toy"])
    assert capsys.readouterr().err == "retrofit: error: cannot reach hf_... with 012...\n"


def test_train_hands_on_the_recipe_with_overrides_anywhere(stub, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    calls = stub("retrofit.training.loop", "train")
    overrides = ["--training.seed", "3", "--optimizer.learning_rate=3e-5"]
    assert cli.main(["train", *overrides, str(tmp_path / "recipe.yaml"), "--data.num_workers", "2"]) == 0
    (((recipe, request), _),) = calls
    assert (recipe.training.seed, recipe.optimizer.learning_rate, recipe.data.num_workers) == (3, 3e-5, 2)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--max_steps", "found --max_steps; write --training.max_steps"),
        ("--training.max_step", "unknown key max_step in section training; nearest known key: max_steps"),
        ("--bf17", "found --bf17"),
    ],
)
def test_train_refuses_unknown_options_before_anything_is_loaded(stub, capsys, tmp_path, argument, expected):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    calls = stub("retrofit.training.loop", "train")
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), argument, "7"]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and not calls


def test_init_and_preprocess_hand_on_their_options(stub):
    calls = stub("retrofit.data.tiny", "init")
    cli.main(["init", "toy", "--d-model", "64", "--kv-heads", "2", "--tied"])
    expected = {"layers": 4, "d_model": 64, "heads": 4, "kv_heads": 2, "mlp_hidden": 192, "vocab_size": 264}
    assert calls == [((Path("toy"),), expected | {"max_sequence_length": 512, "tied": True, "seed": 0})]
    calls = stub("retrofit.data.preprocess", "preprocess")
    cli.main(["preprocess", "a", "b", "--out", "s", "--tokenizer", "toy", "--template", "text", "--max-length", "64"])
    assert calls[0][0] == (["a", "b"], Path("s"))
    assert calls[0][1]["max_length"] == 64 and calls[0][1]["dataset_split"] == "train" and not calls[0][1]["overwrite"]


def test_generate_and_evaluate_hand_on_their_options(stub):
    calls = stub("retrofit.generate", "generate")
    cli.main(["generate", "toy", "--prompt", "a", "--prompt", "b", "--max-length", "9", "--output", "o.jsonl"])
    ((checkpoint,), options) = calls[0]
    assert checkpoint == "toy" and options["prompts"] == ["a", "b"] and options["output"] == Path("o.jsonl")
    assert options["max_length"] == 9 and options["steps"] is None and options["temperature"] is None
    calls = stub("retrofit.evaluation", "evaluate")
    cli.main(["evaluate", "toy", "--task", "loss", "--data", "s", "--limit", "5"])
    assert calls[0][1]["split"] == "held_out" and calls[0][1]["limit"] == 5 and calls[0][1]["output"] is None


def test_env_tells_versions_and_hardware_but_no_secret(capsys, monkeypatch):
    token = "hf_" + "aB3" * 11
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("SECRET_NAME_OF_MINE", "secret value of mine")
    monkeypatch.setattr(sys, "argv", ["retrofit", "env", token])
    assert cli.main(["env", "--json"]) == 0
    shown = capsys.readouterr().out
    record = json.loads(shown)
    assert record["packages"]["torch"] and record["hardware"]["cpu_count"] >= 1 and record["argv"][2] == "hf_..."
    assert token not in shown and "secret value" not in shown and "SECRET_NAME" not in shown
    assert cli.main(["env"]) == 0
    assert f"torch         {record['packages']['torch']}" in capsys.readouterr().out
    assert json.loads(json.dumps(environment())) == record


def test_git_state_is_of_the_repository_that_tracks_the_file(tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    tracked, installed = tmp_path / "tracked.py", tmp_path / "installed.py"
    tracked.write_text("a")
    installed.write_text("a")
    assert git_state(tracked) is None
    git("init", "-b", "main")
    git("add", "tracked.py")
    git("commit", "-m", "a")
    state = git_state(tracked)
    assert state and len(state["commit"]) == 40 and state["branch"] == "main" and state["modified"] is False
    tracked.write_text("b")
    assert git_state(tracked) == {**state, "modified": True}
    assert git_state(installed) is None
