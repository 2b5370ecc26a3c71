"""Launch files: accelerate's own parser is given every command of their headers, and what ranks are told is read."""

import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch/accelerate").glob("*.yaml"))

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def headers(path):
    """The launch commands of a file's header."""
    return [
        line.removeprefix("#").strip()
        for line in path.read_text().splitlines()
        if line.startswith("#   accelerate launch ")
    ]


def told(command, monkeypatch):
    """(options, environment of the ranks) that `accelerate launch` makes of a command."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    words = shlex.split(command.replace("--machine_rank R", "--machine_rank 1"))
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words[2:]))
    assert (args.module, args.training_script, len(args.training_script_args)) == (True, "retrofit.train", 1)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # launch_command sets it
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_line_starts_what_the_file_says(path, monkeypatch):
    said = YAML(typ="safe", pure=True).load(path)
    commands = headers(path)
    assert commands, path
    machines = set()
    for command in commands:
        args, environment = told(command, monkeypatch)
        assert args.config_file == f"launch/accelerate/{path.name}"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        kind = said["distributed_type"]
        assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == tuple(
            kind == name for name in ("DEEPSPEED", "FSDP", "MULTI_GPU")
        )
        if kind == "DEEPSPEED":
            config = Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
            assert config.name == f"{path.stem}.json" and config.is_file()
            assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
            assert args.deepspeed_multinode_launcher == "standard"
            assert "mixed_precision" not in said  # accelerate refuses it beside a DeepSpeed JSON
        if kind == "FSDP":
            assert environment["FSDP_VERSION"] == "2" and environment["FSDP_OFFLOAD_PARAMS"] == "false"
        machines.add(args.num_machines)
        if args.num_machines == 2:
            assert args.num_processes == 16 and args.machine_rank == 1 and args.main_process_port == 29500
    assert 2 in machines, f"{path.name} does not say how two nodes are launched"


def test_hybrid_sharding_reaches_the_ranks(monkeypatch):
    (command,) = headers(ROOT / "launch/accelerate/fsdp2-hybrid.yaml")
    _, environment = told(command, monkeypatch)
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert [environment[f"PARALLELISM_CONFIG_DP_{size}_SIZE"] for size in ("REPLICATE", "SHARD")] == ["2", "8"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_launch_lines_of_a_recipe_are_taken_by_accelerate(path, monkeypatch):
    for command in headers(path):
        args, _ = told(command, monkeypatch)
        assert Path(args.config_file) in [file.relative_to(ROOT) for file in FILES]
        assert args.training_script_args == [str(path.relative_to(ROOT))]
        assert (args.num_machines or 1, args.num_processes) in [(1, 2), (2, 16)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_file_says_its_hardware(path):
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert re.search(r"GPUs only|on the CPU", header)
