import os
import pytest, torch
from retrofit.recipe import dump_recipe
from retrofit.training.loop import train
from tests.training.runs import launch, outcome, read_log, state
from tests.training.test_engines import log_difference, COMMON

BASE = (*COMMON, "--training.max_steps=4")
LORA = (
    "--lora.r=3",
    "--lora.lora_alpha=6",
    "--lora.lora_dropout=0.3",
    "--lora.target_modules=[q_proj, v_proj, model.transformer.ff_out]",
)
BF = ("--training.bf16=true",)
S = {}
for kind, o in {"full": (), "full-bf16": BF, "lora": LORA, "lora-bf16": (*LORA, *BF, "--model.dtype=bfloat16")}.items():
    for mode in ("false", "true", "2", "selective"):
        S[f"{kind}-{mode}"] = (*BASE, *o, f"--training.gradient_checkpointing={mode}")
C = {}
for kind, o in {"full": (), "lora": LORA, "lora-bf16": (*LORA, *BF, "--model.dtype=bfloat16")}.items():
    for mode in ("false", "true", "selective"):
        C[f"{kind}-{mode}-c"] = (*BASE, *o, f"--training.gradient_checkpointing={mode}", "--training.compile=true")


@pytest.mark.parametrize("engine", os.environ["ENG"].split(","))
def test_hand(engine, make_recipe, tmp_path):
    names = {**S, **({} if engine == "zero3" else C)}
    if os.environ.get("PICK"):
        names = {k: v for k, v in names.items() if os.environ["PICK"] in k or k.endswith("-false")}
    for n, o in names.items():
        dump_recipe(make_recipe(tmp_path / n, *o), tmp_path / f"{n}.yaml")
    err = launch(engine, tmp_path, list(names))
    print(chr(10).join(l for l in err.splitlines() if "COUNT" in l or "recompile_limit" in l))
    for n in names:
        print("outcome", n, outcome(tmp_path, n))
        if n.endswith("-c"):
            ref = n.rsplit("-", 2)[0] + "-false"
        else:
            ref = n.rsplit("-", 1)[0] + "-false"
        try:
            d = log_difference(tmp_path / n, tmp_path / ref)
            a, b = state(tmp_path / n, 4), state(tmp_path / ref, 4)
            print("measured", engine, n, d, "bits", all(torch.equal(a[k], b[k]) for k in b))
        except Exception as e:
            print("ERR", n, repr(e)[:300])
