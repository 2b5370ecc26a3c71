"""The validate verb: each kind of problem is found and named, all at once, and nothing on disk is changed."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrofit import cli
from retrofit.recipe import dump_recipe
from retrofit.training.launch_file import LaunchFile
from retrofit.training.loop import train
from retrofit.training.processes import check_launch

ROOT = Path(__file__).parents[1]
DDP = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: zero.json}\n"
FSDP = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n"

SIZES = "parallelism_config: {{parallelism_config_{}_size: 2, parallelism_config_dp_shard_size: 2}}\n"


@pytest.fixture
def place(make_recipe, tmp_path, monkeypatch):
    """A directory with recipe.yaml, in which the tests run."""
    dump_recipe(make_recipe(tmp_path / "run"), tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def validate(place, capsys):
    """Runs the verb; gives (exit code, {check: [(state, text)]}) and checks that nothing on disk has changed."""

    def contents():
        return {path: path.stat().st_mtime_ns for path in place.rglob("*")}

    def validate(*options):
        before = contents()
        code = cli.main(["validate", "recipe.yaml", *options])
        assert contents() == before
        found = {}
        for line in capsys.readouterr().out.splitlines():
            state, _, rest = line.partition(" ")
            what, _, text = rest.strip().partition(": ")
            found.setdefault(what, []).append((state, text))
        return code, found

    return validate


def problems(found):
    return [text for lines in found.values() for state, text in lines if state == "problem"]


@pytest.fixture
def launch_problems(validate, place):
    """The problems that a launch file's text makes."""

    def launch_problems(text, *options):
        (place / "launch.yaml").write_text(text)
        code, found = validate("--launch", "launch.yaml", *options)
        assert code == (2 if problems(found) else 0)
        return problems(found)

    return launch_problems


def test_a_recipe_that_fits_passes_and_its_size_is_told(validate):
    code, found = validate()
    assert code == 0 and problems(found) == []
    assert "parameters are trained" in found["weights"][0][1]
    assert "of it training state" in found["checkpoints"][0][1]
    assert found["run"] == [("ok", "starts at step 0")] and found["space"] == [("ok", "enough")]


def test_problems_of_every_kind_are_named_at_once(validate, place):
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").touch()
    (place / "launch.yaml").write_text(DDP + "mixed_precision: fp16\n")
    code, found = validate(
        "--launch=launch.yaml",
        "--training.gradient_accumulation_steps=8",
        "--objective.window=64",
        "--training.max_tokens_per_device=65",
        "--model.dtype=bfloat16",
        "--lora.r=2",
        "--lora.lora_alpha=2",
        "--lora.target_modules=[q_proj]",
    )
    assert code == 2
    named = sorted(what for what, lines in found.items() if any(state == "problem" for state, _ in lines))
    assert named == ["launch file and recipe", "objective", "output directory", "window"]
    assert len(found["launch file and recipe"]) == 2  # precision and batch sizes


def test_a_document_beyond_the_token_budget_is_named_with_its_length(validate):
    code, found = validate("--training.max_tokens_per_device=20")
    (problem,) = problems(found)
    assert code == 2 and found["token budget"] == [("problem", problem)]
    assert "20 rows cannot hold the longest document of" in problem and "make it at least 2" in problem


def test_problems_of_the_recipe_are_told_with_the_launch_files(validate, place):
    (place / "launch.yaml").write_text("num_processes: 2\n")
    code, found = validate("--launch", "launch.yaml", "--training.seed=x", "--optimizer.learning_rate=y")
    assert code == 2 and len(problems(found)) == 3
    assert found["everything else"] == [("skipped", "needs the recipe")]


def test_a_missing_shard_a_wrong_target_and_a_token_beyond_the_embedding(validate, place, toy):
    def with_model(name, change, *options):
        shutil.copytree(toy / "model", place / name)
        change(place / name)
        code, found = validate(f"--model.init_from={place / name}", *options)
        assert code == 2
        (problem,) = problems(found)
        return problem

    assert "model.safetensors" in with_model("bare", lambda path: (path / "model.safetensors").unlink())

    def add_token(path):
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        for number in (262, 263, 264):  # ids go on without a gap
            tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": number, "content": f"<{number}>"})
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))

    problem = with_model("beyond", add_token)
    assert "token '<264>' has id 264, the model has 264 rows of embedding" in problem
    target = "--lora.target_modules=[q_proj, o_proj]"
    problem = with_model("wrong", lambda path: None, "--lora.r=2", "--lora.lora_alpha=2", target)
    assert "o_proj matches no module" in problem and "attn_out" in problem


def test_data_that_were_changed_are_found(validate, place, toy):
    shutil.copytree(toy / "store", place / "store")
    path = place / "store/train/tokens.npy"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    code, found = validate(f"--data.path={place / 'store'}")
    assert code == 2 and found["data"][0][0] == "problem" and found["model"] == [("skipped", "needs the data")]


def test_a_directory_in_use_is_refused_and_left_alone(validate, place):
    (place / "run/checkpoints").mkdir(parents=True)
    (place / "run/lock.json").write_text('{"pid": 1, "host": "elsewhere", "since": "today"}\n')
    child = subprocess.Popen(
        [sys.executable, "-c", "import fcntl,sys; f=open('run/lock.json','r+'); fcntl.lockf(f,fcntl.LOCK_EX); "
         "print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline()
    code, found = validate()
    child.communicate()
    assert code == 2 and "is in use by process 1 on elsewhere" in found["output directory"][0][1]
    assert validate()[0] == 0


def test_a_run_is_gone_on_with_or_refused_as_training_would(validate, place, make_recipe):
    train(make_recipe(place / "run", "--training.max_steps=2"))
    code, found = validate("--training.max_steps=2")
    assert code == 0 and found["run"][0][1].endswith("step-00000002")
    code, found = validate("--training.max_steps=2", "--optimizer.learning_rate=0.5")
    assert code == 2 and "optimizer.learning_rate is 0.5 and was 0.01" in found["run"][0][1]


def test_batch_sizes_that_do_not_fit_are_dropped_where_a_run_goes_on(validate, place, make_recipe):
    (place / "launch.yaml").write_text(DDP)
    options = ("--training.max_steps=2", "--training.per_device_train_batch_size=4", "--num_processes=3")
    for launched in ((), ("--launch", "launch.yaml")):
        code, found = validate(*options, *launched)
        assert code == 2 and "4 on 3 ranks makes 12 documents" in problems(found)[0]
    train(make_recipe(place / "run", "--training.max_steps=2"))
    for launched in ((), ("--launch", "launch.yaml")):
        assert validate(*options, *launched)[0] == 0


@pytest.mark.parametrize(("free", "code"), [(1000, 2), (1_500_000, 0)])
def test_a_disk_that_is_too_small_is_found(validate, monkeypatch, free, code):
    status = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr("retrofit.training.preflight.os.statvfs", lambda path: status)
    found_code, found = validate()
    assert found_code == code
    if code:
        assert "one checkpoint takes" in found["space"][0][1]
    else:
        assert [state for state, _ in found["space"]] == ["ok", "warning"]


def test_a_model_of_the_hub_that_is_not_here_is_skipped(place):
    environment = {**os.environ, "HF_HOME": str(place / "hub"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "retrofit", "validate", "recipe.yaml", "--model.init_from=someone/some-model"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped  model: someone/some-model is no directory here" in done.stdout
    assert "skipped  samples, checkpoints, space: need the model" in done.stdout


# --------------------------------------------------------------------------------------------------------- launch files


@pytest.mark.parametrize("path", sorted((ROOT / "launch/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_launch_file_fits_a_plain_recipe(path, make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = make_recipe(tmp_path / "run", "--training.bf16=true")
    LaunchFile.read(path.relative_to(ROOT)).check(recipe)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "MULTI_CPU starts one process instead of 2; use MULTI_GPU"),
        ("distributed_type: NO\nnum_processes: 2\n", "NO starts one process instead of 2"),
        ("distributed_type: MEGATRON_LM\nnum_processes: 2\n", "MEGATRON_LM is not supported; use MULTI_GPU"),
        ("distributed_type: MULTI_GPU\n", "num_processes: is null; give --num_processes N"),
        (DDP + "mixed_precision: no\n", 'mixed_precision: accelerate fails on no without quotes; write "no"'),
        (DDP + "num_machines: 3\n", "num_processes: 2 over all machines is no multiple of num_machines: 3"),
        (DDP + "mixed_precision: bf16\n", "mixed_precision: is bf16 and the recipe's training.bf16 is false"),
        (DDP + "num_proceses: 3\n", "num_proceses: accelerate does not know this"),
        (DDP.replace("2", '"2"'), 'num_processes: expected an integer, found "2"'),
        ("- 1\n", "not an accelerate config"),
        ("a: [\n", "not a YAML file"),
        (FSDP.replace("2}", "1}"), "fsdp_version: is 1; only 2 is supported"),
        (FSDP.replace("2}", "2, fsdp_offload_params: true}"), "offloading is not supported"),
        (
            FSDP + SIZES.format("dp_replicate"),
            "dp_replicate_size: 2 times dp_shard_size: 2 is not the number of processes, 2",
        ),
        (FSDP + SIZES.format("tp"), "tp_size: is not supported"),
        (ZERO, "deepspeed_config_file: zero.json: No such file"),
        (DDP + "main_process_port: 99999\n", "99999 is no port"),
    ],
)  # fmt: skip
def test_a_launch_that_would_not_do_what_it_says_is_refused(launch_problems, text, expected):
    (problem,) = launch_problems(text)
    assert problem.startswith("launch.yaml: ") and expected in problem


@pytest.mark.parametrize(
    "text",
    ["distributed_type: NO\n", DDP.replace("2", "1"), DDP + 'mixed_precision: "no"\n', DDP + "use_cpu: true\n"],
)
def test_a_launch_that_accelerate_takes_is_not_refused(launch_problems, text):
    assert launch_problems(text) == []


@pytest.mark.parametrize(("version", "offload"), [("1", "false"), ("2", "true")])
def test_training_refuses_the_fsdp_that_validate_refuses(version, offload, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(bf16=False)
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", offload)
    with pytest.raises(ValueError, match="use fsdp_version: 2 without fsdp_offload_params"):
        check_launch(bf16=False)


def test_a_number_of_processes_on_the_command_line_wins(launch_problems):
    assert launch_problems(DDP, "--training.per_device_train_batch_size=4") == []
    (problem,) = launch_problems(DDP, "--training.per_device_train_batch_size=4", "--num_processes", "3")
    assert "on 3 ranks" in problem


def test_deepspeeds_json_is_held_against_the_recipe(launch_problems, place):
    def with_json(**fields):
        (place / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **fields}))
        return launch_problems(ZERO)

    assert with_json(gradient_accumulation_steps="auto", gradient_clipping="auto") == []
    (problem,) = with_json(gradient_accumulation_steps="8")
    assert problem.startswith('zero.json: gradient_accumulation_steps: expected an integer, found the text "8"')
    assert len(with_json(gradient_accumulation_steps=4, gradient_clipping=2.0, fp16={"enabled": True})) == 3
    (place / "zero.json").write_text("{")
    (problem,) = launch_problems(ZERO)
    assert problem.startswith("zero.json: not readable as JSON")
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (problem,) = launch_problems(ZERO + 'mixed_precision: "no"\n')
    assert "mixed_precision: accelerate refuses it beside a DeepSpeed JSON" in problem
    (problem,) = launch_problems(ZERO.replace("zero.json}", "zero.json, zero_stage: 2}"))
    assert "zero_stage: accelerate refuses this beside zero.json" in problem
    (problem,) = launch_problems(ZERO + "num_machines: 2\n")
    assert "deepspeed_multinode_launcher" in problem


def test_deepspeeds_fields_in_the_launch_file_are_held_against_the_recipe(launch_problems):
    text = ZERO.replace("deepspeed_config_file: zero.json", "zero_stage: 3, gradient_clipping: 2.0")
    (problem,) = launch_problems(text)
    assert problem.startswith("launch.yaml: gradient_clipping: is 2.0, but the recipe's optimizer.max_grad_norm is 1.0")
    assert launch_problems(text.replace("2.0", "1.0")) == []


def test_a_port_in_use_is_named_with_the_way_to_choose_another(launch_problems):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (problem,) = launch_problems(f"{DDP}main_process_port: {port}\n")
        assert f"port {port} is in use on this machine; choose another with --main_process_port N" in problem
    assert launch_problems(f"{DDP}main_process_port: {port}\n") == []


def test_attention_that_is_not_installed_is_a_problem(validate, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "flash_attn" else find(name))
    code, found = validate("--training.attention=flash", "--training.bf16=true")
    (text,) = problems(found)
    assert code == 2 and text.startswith(
        "training.attention: flash needs the package flash-attn, which is not installed"
    )
