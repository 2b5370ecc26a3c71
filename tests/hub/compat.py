"""`make compat`: exported folders in several versions of transformers, fp32 and bf16, as a table.

Each version gets a virtual environment under .compat/ that sees this one's packages behind its own, so that torch is
not downloaded again. `standalone.py` says what is tried in each; its outputs are compared with ours, bit by bit. Needs
a package index; exit code 1 if anything differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from retrofit.checkpoints import loading
from retrofit.hub.export import export
from tests.hub.conftest import make
from tests.hub.standalone import outputs, same

ROOT = Path(__file__).parents[2]
VERSIONS = ("4.57.6", "5.0.0", "pinned", "newest")
DTYPES = ("float32", "bfloat16")


def python_with(version: str) -> str:
    """The interpreter of an environment with a version of transformers, made where it is not there yet."""
    if version == "pinned":
        return sys.executable
    directory = ROOT / ".compat" / version
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
        (own / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = ["--upgrade", "transformers"] if version == "newest" else [f"transformers=={version}"]
    installed = subprocess.run([python, "-m", "pip", "install", *wanted], capture_output=True, text=True)
    if installed.returncode:
        raise SystemExit(f"transformers {version}: pip failed: {installed.stderr.strip().splitlines()[-1]}")
    return str(python)


def attempt(python: str, folder: Path, dtype: str) -> tuple[str, str]:
    """(version of transformers, what came of it in a few words)."""
    with tempfile.TemporaryDirectory() as work:
        script = [python, "-I", str(Path(__file__).parent / "standalone.py"), str(folder), work, dtype]
        ran = subprocess.run(script, cwd=work, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ran.returncode:
            return "?", f"FAILED: {ran.stderr.strip().splitlines()[-1]}"
        record = json.loads(ran.stdout.splitlines()[-1])
        model, _ = loading.load_model(folder, dtype=getattr(torch, dtype))
        equal = same(load_file(Path(work, "outputs.safetensors")), outputs(model))
    bad = [name for name, value in record.items() if value is False] + ([] if equal else ["outputs"])
    checks = sum(value is True for value in record.values())
    return record["transformers"], f"FAILED: {', '.join(bad)}" if bad else f"equal to ours; {checks} checks"


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as root:
        adapter = make(Path(root))
        export(str(adapter), Path(root, "flexmdm"), shard_size="20KB")
        export(str(adapter), Path(root, "base"), shard_size="20KB", base_only=True)
        print(f"{'transformers':<22}{'folder':<10}{'dtype':<10}outcome", flush=True)
        for version in VERSIONS:
            python = python_with(version)
            for folder in ("flexmdm", "base"):
                for dtype in DTYPES:
                    found, outcome = attempt(python, Path(root, folder), dtype)
                    name = found if version == found else f"{found} ({version})"
                    print(f"{name:<22}{folder:<10}{dtype:<10}{outcome}", flush=True)
                    failed |= outcome.startswith("FAILED")
    return int(failed)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
