"""The model card of an exported folder: made from a real run, valid, and without anything of the machine."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from retrofit.checkpoints import loading
from retrofit.cli import main
from retrofit.hub import facts
from retrofit.hub.facts import last_name, without_paths
from retrofit.hub.metadata import check_license
from tests.conftest import MakeRecipe
from tests.hub.conftest import make

PROMPT = "see /home/someone/notes.txt"
ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "aB3dE6gH9" * 4


@pytest.fixture(scope="module")
def run(toy: Path, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FlexMDM trained for 6 steps, with samples and held-out losses, and `scores` beside it."""
    root = tmp_path_factory.mktemp("card")
    file = root / "recipe.yaml"
    make_recipe(root / "run", file=file)
    options = ["--training.eval_steps=3", "--training.sample_steps=3", "--sampling.steps=4"]
    assert main(["train", str(file), *options, f"--sampling.prompts=['{PROMPT}']"]) == 0
    scores = ["--task", "loss", "--data", str(toy / "store"), "--output", str(root / "scores")]
    assert main(["evaluate", str(root / "run"), *scores]) == 0
    return root / "run"


def headings(text: str) -> list[str]:
    return re.findall(r"^## .*$", text, re.M)


def export(source: Path, dest: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """(text, metadata) of the card of an export."""
    assert main(["export", str(source), str(dest), *options]) == 0
    card = ModelCard.load(dest / "README.md")
    return card.content, card.data.to_dict()


def run_apart(text: str, beside: Path, cache: Path) -> str:
    """What the card's Python prints in a process that has no retrofit."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    hidden = "import sys; sys.modules['retrofit'] = None\n"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", hidden + code], cwd=beside, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_a_card_says_what_the_run_recorded_and_its_code_runs(run: Path, tmp_path: Path) -> None:
    options = ["--license", "apache-2.0", "--dataset", "some/data", "--evaluation", str(run.parent / "scores")]
    text, metadata = export(run, tmp_path / "flexmdm", *options)
    drawn = {f"img/{path.name}" for path in (tmp_path / "flexmdm/img").iterdir()}
    assert drawn == {"img/loss.png", "img/lengths.png", "img/calibration.png"}
    assert set(re.findall(r"\]\((img/[^)]+)\)", text)) == drawn
    assert headings(text) == headings((ROOT / "docs/card-sample.md").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train, held_out = ([record for record in log if record["kind"] == kind] for kind in ("train", "held_out"))
    assert "| steps | 6 of 6 |" in text and "| documents seen | 48 (8 a step) |" in text
    assert f"| tokens seen | {train[-1]['tokens']:,} |" in text
    assert f"| held-out loss | {held_out[-1]['loss']:.4g} (unmasking" in text
    assert "from `model`, which is not from the Hub" in text and "`rows.jsonl` (64 rows)" in text
    assert "energy" not in text  # of a CPU nothing is known
    assert {key: metadata[key] for key in ("license", "library_name", "pipeline_tag", "datasets")} == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "datasets": ["some/data"],
    }  # fmt: skip
    assert "base_model" not in metadata and "flexmdm" in metadata["tags"]
    summary = json.loads((run.parent / "scores/settings.json").read_text())["summary"]
    (result,) = metadata["model-index"][0]["results"]
    found = {metric["name"].split()[0]: metric["value"] for metric in result["metrics"]}
    assert result["dataset"] == {"name": "training data", "type": "some/data", "split": "held_out"}
    assert found == {name: round(term["mean"], 4) for name, term in summary["terms"].items()}
    assert f"| insertion | {summary['terms']['insertion']['mean']:.3f} |" in text
    assert "`retrofit evaluate CHECKPOINT --task loss --data DATA --split held_out --seed 0`" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code.splitlines()) == 5
    assert run_apart(text, tmp_path, tmp_path / "cache").startswith("see notes.txt")


def test_a_card_holds_nothing_of_the_machine(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where things lie, nor who and where it was, nor what the environment holds: what a run records, poisoned."""
    poisoned = tmp_path / "someone-home" / "run"
    shutil.copytree(run, poisoned)
    record = json.loads((poisoned / "environment.json").read_text())
    record["argv"] = ["/opt/secret/retrofit", "train", TOKEN]
    record["platform"], record["git"] = "Linux-on-secret-host", {"commit": "c" * 40, "branch": "secret-branch"}
    (poisoned / "environment.json").write_text(json.dumps(record))
    recipe = (poisoned / "recipe.yaml").read_text()
    recipe = re.sub("output_dir: .*", "output_dir: secret-project/run", recipe)
    prompts = f"  - 'C:\\secret\\x and {TOKEN}'\n  - ~/secret/y\n"
    (poisoned / "recipe.yaml").write_text(recipe.replace("  prompts:\n", "  prompts:\n" + prompts))
    monkeypatch.setenv("WANDB_API_KEY", "secret0123456789secret")
    text, _ = export(poisoned, tmp_path / "out")
    assert "output_dir: run\n" in text and "init_from: model\n" in text and "path: store\n" in text
    assert "secret" not in text and TOKEN not in text and "someone" not in text
    for word in (str(Path.home()), str(tmp_path), str(run), socket.gethostname(), os.getcwd()):
        assert word not in text or len(word) < 3, word
    user = getpass.getuser()
    assert not re.search(rf"[/\\]{re.escape(user)}\b", text)
    links = re.sub(r"https://\S+", "", text)
    assert re.findall(r"(?<![\w.)<])(?:/|~/|[A-Z]:\\)\w+", links) == []
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_the_card_of_a_checkpoint_ends_at_its_step(run: Path, tmp_path: Path) -> None:
    text, _ = export(run / "checkpoints" / "step-00000004", tmp_path / "four")
    assert "| steps | 4 of 6 |" in text and "| documents seen | 32 (8 a step) |" in text
    assert "at step 3, " in text


def test_a_base_without_the_rest_says_what_it_is_good_for(run: Path, tmp_path: Path) -> None:
    text, metadata = export(run, tmp_path / "base", "--base-only")
    assert "good as a start for other training" in text and "at 8B it is untested" in text
    assert "flexmdm" not in metadata["tags"]
    assert run_apart(text, tmp_path, tmp_path / "cache").startswith("see notes.txt")


def test_a_run_of_a_plain_llada_has_a_card_of_its_own(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_recipe(tmp_path / "run", file=tmp_path / "recipe.yaml")
    options = ["--objective.name=mdm", "--model.time_hidden_size=null", "--training.max_steps=2"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *options, "--training.sample_steps=2"]) == 0
    text, metadata = export(tmp_path / "run", tmp_path / "out")
    assert "A plain LLaDA, a masked-diffusion language model with a fixed window: made from `model`" in text
    assert "objective | mdm, window 32" in text and "flexmdm" not in metadata["tags"]
    assert [path.name for path in (tmp_path / "out/img").iterdir()] == ["loss.png"]


def test_a_folder_without_a_run_has_a_card_of_what_is_known(tmp_path: Path) -> None:
    adapter = make(tmp_path)
    text, metadata = export(adapter, tmp_path / "folder")
    assert "made from [some/llada](https://huggingface.co/some/llada) at revision `c0ffee`" in text
    assert metadata["base_model"] == "some/llada" and "license" not in metadata and "model-index" not in metadata
    assert "belongs to no run" in text and "Licence of the weights: none was stated" in text
    assert "power (exponent 1.7)" in text and not (tmp_path / "folder/img").exists()
    run_apart(text, tmp_path, tmp_path / "cache")


def test_a_stated_base_stands_in_card_and_config(run: Path, tmp_path: Path) -> None:
    text, metadata = export(run, tmp_path / "out", "--base-model", "GSAI-ML/LLaDA-8B-Base")
    assert metadata["base_model"] == "GSAI-ML/LLaDA-8B-Base" and metadata["base_model_relation"] == "finetune"
    assert "revision not recorded" in text
    assert json.loads((tmp_path / "out/config.json").read_text())["base_model"] == "GSAI-ML/LLaDA-8B-Base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "Apache 2"], "--license: 'Apache 2' is not a licence .* perhaps apache-2.0"),
        (["--base-model", "/home/me/llada"], "--base-model: '/home/me/llada' is not the id of anything on the Hub"),
        (["--dataset", "a/b/c"], "--dataset: 'a/b/c' is not the id"),
        (["--evaluation", "nowhere"], "--evaluation nowhere: no settings.json there"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_path_as_base_in_config_is_refused_unless_the_base_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = make(tmp_path)
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"base_model": "/home/me/llada", "base_revision": None}))
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 2
    assert "config.json: base_model: '/home/me/llada'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    _, metadata = export(adapter, tmp_path / "out", "--base-model", "some/llada")
    assert metadata["base_model"] == "some/llada"
    assert "/home/me" not in (tmp_path / "out/config.json").read_text()


def test_another_base_than_is_recorded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(make(tmp_path)), str(tmp_path / "out"), "--base-model", "other/llada"]) == 2
    assert "config.json says 'some/llada'" in capsys.readouterr().err


def test_an_evaluation_of_other_weights_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = str(run.parent / "scores")
    assert main(["export", str(run / "checkpoints/step-00000004"), str(tmp_path / "a"), "--evaluation", scores]) == 2
    assert "is of other weights" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "b"), "--base-only", "--evaluation", scores]) == 2
    assert "scores a flexmdm, which is not what is exported" in capsys.readouterr().err
    (tmp_path / "torn").mkdir()
    for content in ("{", "[]", '{"task": "maze"}'):
        (tmp_path / "torn/settings.json").write_text(content)
        assert main(["export", str(run), str(tmp_path / "c"), "--evaluation", str(tmp_path / "torn")]) == 2
        assert "not the settings of an evaluation" in capsys.readouterr().err


def test_broken_gaps_of_an_evaluation_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(run.parent / "scores", tmp_path / "scores")
    for content in ("{", '{"expected": 1}\n', '["a"]\n', '{"expected": "x", "missing": 1}\n'):
        (tmp_path / "scores/gaps.jsonl").write_text(content)
        assert main(["export", str(run), str(tmp_path / "out"), "--evaluation", str(tmp_path / "scores")]) == 2
        error = capsys.readouterr().err
        assert "gaps.jsonl: not rows of expected and missing tokens" in error and len(error.splitlines()) == 1


def test_scores_of_the_maze_carry_the_sampler(run: Path, tmp_path: Path) -> None:
    sampler = {"steps": 16, "temperature": 0.5, "seed": 3, "order": "confidence", "counts": "binomial"}
    level = {"problems": 200, "success": 0.935, "interval": [0.892, 0.962]}
    settings = {
        "checkpoint": "/home/me/run", "checkpoint_digest": loading.resolve(run).digest(), "model_type": "flexmdm",
        "task": "maze", "split": "eval", "limit": 200, "sampler": sampler, "data": {"maze.json": "ab" * 32},
        "summary": {"levels": {"easy": level}},
    }  # fmt: skip
    (tmp_path / "maze").mkdir()
    (tmp_path / "maze/settings.json").write_text(json.dumps(settings))
    text, metadata = export(run, tmp_path / "out", "--evaluation", str(tmp_path / "maze"))
    assert "| easy | 200 | 93.5 % | 89.2 to 96.2 % |" in text
    command = (
        "--task maze --data DATA --split eval --limit 200 --steps 16 --order confidence --temperature 0.5 --seed 3"
    )
    assert f"`retrofit evaluate CHECKPOINT {command}`" in text
    (metric,) = metadata["model-index"][0]["results"][0]["metrics"]
    assert (metric["value"], metric["args"]) == (93.5, sampler)


def test_energy_is_rated_power_times_time_marked_as_an_estimate(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "environment.json").read_text())
    record["hardware"]["gpus"] = [{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80.0}] * 8
    (copy / "environment.json").write_text(json.dumps(record))
    log = [
        {"step": step, "kind": "train", "loss": 1.0, "documents": 8 * step, "tokens": step, "seconds_per_step": seconds}
        for step, seconds in ((2, 1800.0), (6, 900.0))
    ]
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 7, "kin')
    found = facts.read(copy / "final")
    assert found is not None and found.seconds == 7200.0
    assert dataclasses.replace(found, processes=8).watts == 5600
    text, _ = export(copy, tmp_path / "out")  # its checkpoints say that one process trained it
    assert "| energy | about 1.4 kWh, an estimate" in text and "8 x NVIDIA H100 80GB HBM3 a machine" in text
    record["hardware"]["gpus"] = [{"name": "Some GPU", "memory_gib": 80.0}]
    (copy / "environment.json").write_text(json.dumps(record))
    assert "energy" not in export(copy, tmp_path / "unknown")[0]


def test_data_that_changed_since_are_not_described(run: Path, toy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(str(toy / "store"), str(toy / "other_store")))
    options = ["--dataset", "some/data", "--evaluation", str(run.parent / "scores")]
    _, metadata = export(copy, tmp_path / "scored", *options)
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "prepared-documents"
    text, _ = export(copy, tmp_path / "out")
    assert "not at hand" in text and not (tmp_path / "out/img/lengths.png").exists()


def test_a_broken_recipe_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for content in ("a: [", "- 1", "model: 3"):
        (copy / "recipe.yaml").write_text(content)
        assert main(["export", str(copy), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "recipe.yaml: not a recipe" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see /home/me/llada now", "see llada now"),
        ("host:/home/me/q, --p=/etc/x", "host:q, --p=x"),
        ("~/x/y ../a/b.txt file:///home/me/z", "y b.txt z"),
        (r"C:\Users\me\f", "f"),
        ("//home/me/k", "k"),
        ("https://arxiv.org/abs/1 and/or 1/2 a / b", "https://arxiv.org/abs/1 and/or 1/2 a / b"),
    ],
)
def test_paths_are_cut_to_their_last_names(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_the_last_name_of_a_runs_own_folders_is_the_runs() -> None:
    assert [last_name(path) for path in ("/a/toy/final", "toy/checkpoints/step-00000200", "toy", "final", "/")] == [
        "toy", "toy", "toy", "final", "",
    ]  # fmt: skip


def test_licences_are_those_of_the_hub() -> None:
    for name in ("apache-2.0", "mit", "other", "cc-by-sa-4.0"):
        check_license("x", name)
    for name in ("MIT", "apache2", "", "proprietary"):
        with pytest.raises(ValueError, match=f"^x: {name!r} is not a licence"):
            check_license("x", name)
