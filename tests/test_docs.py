"""Every command that the docs show is run here, in their order, on a small file and with few training steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrofit.cli import main
from retrofit.recipe import load_recipe
from tests.hub_stand_in import Account, StandIn, in_place_of_the_hub

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/data.md", "docs/training.md", "docs/resuming.md", "docs/sampling.md", "docs/hub.md"]
MAKE = {"make demo", "make test"}  # what the continuous integration and the demo's own script run


def commands(page: str) -> list[str]:
    """Indented lines that begin like a command, comments taken off."""
    lines = re.findall(r"^    ((?:retrofit|accelerate|make) .*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    return [line.split("  #")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipes, shortened, and thirty word problems."""
    path = tmp_path_factory.mktemp("docs")
    for folder in ("recipes", "launch"):
        shutil.copytree(ROOT / folder, path / folder)
    recipe = path / "recipes/toy/gsm8k.yaml"
    text = recipe.read_text()
    for name, value in {
        "max_steps": 3,
        "save_steps": 2,
        "eval_steps": 3,
        "eval_documents": 4,
        "sample_steps": 3,
    }.items():
        text, found = re.subn(rf"^  {name}: .*$", f"  {name}: {value}", text, flags=re.M)
        assert found == 1, name
    recipe.write_text(text)
    rows = [
        {"question": f"Ann has {i} apples and buys {j}.", "answer": f"{i} + {j} = {i + j}\n#### {i + j}"}
        for i in range(20)
        for j in range(10)
    ]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = ROOT / "tests/golden/flexmdm_reference"
    (path / "published").mkdir()
    shutil.copyfile(golden / "state_dict.safetensors", path / "published/model.safetensors")
    config = json.loads((golden / "config.json").read_text())
    for name in ("lora", "time_group_size"):
        del config[name]
    (path / "published/config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """What `push` talks to: the account `me` of a Hub on this machine."""
    token = "hf_" + "Q7" * 16
    with StandIn({token: Account("me")}) as hub:
        in_place_of_the_hub(hub, token, monkeypatch)
        yield hub


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, workplace: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    found = commands(page)
    assert found
    for command in found:
        program, *arguments = shlex.split(command)
        if program == "retrofit":
            assert main(arguments) == 0, command
        elif program == "accelerate":
            launcher = [sys.executable, "-m", "accelerate.commands.launch"]
            launched = subprocess.run(
                [*launcher, *arguments[1:]],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            assert launched.returncode == 0, (command, launched.stderr[-2000:])
        else:
            assert command in MAKE, command


def python_of(page: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return str(block)


def test_the_python_of_the_docs_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(compile(python_of("docs/sampling.md"), "docs/sampling.md", "exec"), {})


def test_the_python_for_an_exported_folder_runs_without_retrofit(workplace: Path) -> None:
    code = "import sys; sys.modules['retrofit'] = None\n" + python_of("docs/hub.md")
    environment = os.environ | {"HF_HOME": str(workplace / "cache"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=workplace, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout) > len("Ann has")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_it_is_launched(path: Path) -> None:
    load_recipe(path)
    header = path.read_text().split("model:")[0]
    assert "# Hardware:" in header and f"retrofit train {path.relative_to(ROOT)}" in header


def test_links_between_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
