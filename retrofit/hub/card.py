"""The model card of an exported folder: README.md and its pictures, made from what the run recorded.

What no file says is left out, or said to be unknown. Paths are cut to their last names, and neither the command line,
the platform nor anything of the environment is read.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from retrofit.checkpoints import loading
from retrofit.checkpoints.loading import Source
from retrofit.checkpoints.weights import Weights
from retrofit.credentials import mask_tokens
from retrofit.evaluation.loss import GAPS
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.training.log import format_seconds
from retrofit.viewing import training as pictures

from .facts import Facts, last_name, read, without_paths
from .metadata import PAPER, base_model_of, card_data, check_hub_id, check_license

CARD = "README.md"
LOSS, LENGTHS, CALIBRATION = "img/loss.png", "img/lengths.png", "img/calibration.png"
_STEPS = 64  # of the sampler, where the run names none

CITATION = f"""```bibtex
@misc{{kim2025anyorder,
  title = {{Any-Order Flexible Length Masked Diffusion}},
  author = {{Kim, Jaeyeon and Cheuk-Kit, Lee and Domingo-Enrich, Carles and Du, Yilun and Kakade, Sham and
            Ngotiaoco, Timothy and Chen, Sitan and Albergo, Michael}},
  year = {{2025}},
  eprint = {{{PAPER}}},
  archivePrefix = {{arXiv}}
}}
```"""


@dataclass(frozen=True)
class Stated:
    """What the user says for the card, since no file does.

    Attributes:
        base_model: Hub id of what was fine-tuned, where training started from a copy on disk.
        license: of the weights, an identifier of the Hub's.
        datasets: Hub ids of the training data.
        evaluations: directories that `retrofit evaluate --output` wrote.
    """

    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    evaluations: tuple[Path, ...] = ()

    def check(self) -> None:
        """Raises ValueError naming the option and the value that the Hub would refuse."""
        if self.base_model is not None:
            check_hub_id("--base-model", self.base_model)
        if self.license is not None:
            check_license("--license", self.license)
        for dataset in self.datasets:
            check_hub_id("--dataset", dataset)


def make_card(
    source: Source, config: LLaDAConfig, stated: Stated, *, name: str, plain: bool, weights: Weights
) -> dict[str, bytes]:
    """README.md and the pictures that it shows, by their names in the folder.

    Args:
        source, config: what is exported, and the configuration that it has.
        stated: checked by the caller.
        name: of the folder.
        plain: a plain LLaDA is written, whatever the source is.
        weights: that are written.

    Raises:
        ValueError: the recorded base is no Hub id, or another than is stated; an evaluation is unreadable or is not of
            these weights; the run's recipe is broken.
    """
    recorded, revision = getattr(config, "base_model", None), _revision(config)
    base_model = base_model_of(source.directory / "config.json", recorded, revision, stated.base_model)
    evaluations = [_evaluation(path, source, plain=plain) for path in stated.evaluations]
    facts = read(source.directory)
    base_model = base_model or _hub_parent(facts)
    data = card_data(
        name=name,
        base_model=base_model,
        license=stated.license,
        datasets=stated.datasets,
        evaluations=evaluations,
        data_digest=facts.data.digest if facts and facts.data else None,
        is_flexmdm=not plain,
    )
    gaps = next(filter(None, map(_gaps, stated.evaluations)), [])
    drawn = _pictures(facts, gaps)
    parts = [
        f"# {name}",
        _what(config, facts, base_model, plain=plain, weights=weights),
        "## Sampling",
        _sampling(name, source, facts, plain=plain),
        "## Data and licence",
        _data(facts, stated),
        "## Training",
        _training(facts),
        *([f"![Loss by step of training]({LOSS})", _LOSS_TEXT] if LOSS in drawn else []),
        *([f"![Lengths of samples and of data]({LENGTHS})", _LENGTHS_TEXT] if LENGTHS in drawn else []),
        *([_folded_recipe(facts.recipe)] if facts else []),
        "## Evaluation",
        *([_scores(settings) for settings in evaluations] or ["None was given."]),
        *([f"![Tokens missing against expected]({CALIBRATION})", _CALIBRATION_TEXT] if CALIBRATION in drawn else []),
        "## Limits",
        _limits(config, plain=plain),
        "## Citation",
        CITATION,
    ]
    text = mask_tokens(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    ModelCard(text)  # reads its metadata back, scores too
    return {CARD: text.encode(), **drawn}


# ---------------------------------------------------------------------------------------------------------- what it is


def _revision(config: LLaDAConfig) -> str | None:
    return getattr(config, "base_revision", None)


def _hub_parent(facts: Facts | None) -> str | None:
    name, at, _ = ((facts.parent if facts else None) or "").partition(" at ")
    return name if at else None


def _what(config: LLaDAConfig, facts: Facts | None, base_model: str | None, *, plain: bool, weights: Weights) -> str:
    count = sum(map(math.prod, weights.shapes.values()))
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values()})
    size = f"{count:,} parameters in {' and '.join(kinds)}."
    base = _base(config, facts, base_model)
    if not plain:
        assert isinstance(config, FlexMDMConfig)
        return (
            "A FlexMDM: a masked-diffusion language model that also inserts mask tokens, and so writes text of any "
            f"length in any order ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})). It is {base}, with time "
            f"conditioning and an insertion head. {size}\n\nInsertion schedule {_schedule(config.insertion_schedule)}, "
            f"unmasking schedule {_schedule(config.unmasking_schedule)}; at most {config.max_sequence_length - 1:,} "
            "tokens, prompt included."
        )
    if isinstance(config, FlexMDMConfig):
        return (
            f"The backbone of a FlexMDM as a plain LLaDA: {base}, from which time conditioning and insertion head were "
            f"left out. {size} It was fine-tuned with them. It is good as a start for other training, or to see what "
            "fine-tuning did to the backbone. How well it writes by itself was not measured, and at 8B it is untested."
        )
    return f"A plain LLaDA, a masked-diffusion language model with a fixed window: {base}. {size}"


def _base(config: LLaDAConfig, facts: Facts | None, base_model: str | None) -> str:
    """`made from X at revision R`, as far as is known."""
    recorded, revision = getattr(config, "base_model", None), _revision(config)
    if base_model:
        at = f" at revision `{revision}`" if revision and base_model == recorded else ""
        if not at and facts and (facts.parent or "").startswith(f"{base_model} at "):
            at = f" at revision `{(facts.parent or '').partition(' at ')[2]}`"
        return f"made from [{base_model}](https://huggingface.co/{base_model}){at or ', revision not recorded'}"
    local = (facts.parent if facts else None) or recorded
    return (
        f"made from {_code(last_name(local))}, which is not from the Hub" if local else "of a base that is not recorded"
    )


def _schedule(schedule: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in schedule.items() if key != "type")
    return f"{schedule['type']} ({rest})" if rest else str(schedule["type"])


def _code(text: str) -> str:
    """The text between back-ticks, without paths and what would break a table."""
    shown = re.sub(r"[`|\s\x00-\x1f]+", " ", without_paths(text)).strip()
    return f"`{shown}`" if shown else "(no name)"


# ------------------------------------------------------------------------------------------------------------ sampling


def sampling_code(name: str, *, prompt: str, chat: bool, steps: int, plain: bool) -> str:
    """Five lines (of a plain LLaDA seven), for a process beside the folder that has torch and transformers alone."""
    quoted, content = json.dumps(name), json.dumps(without_paths(prompt), ensure_ascii=True)
    ids = f'tokenizer({content}, add_special_tokens=False)["input_ids"]'
    if chat:
        turn = f'[{{"role": "user", "content": {content}}}]'
        ids = f"tokenizer.apply_chat_template({turn}, add_generation_prompt=True, return_dict=False)"
    lines = [
        "from transformers import AutoModel, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted}, trust_remote_code=True)",
        f'model = AutoModel.from_pretrained({quoted}, trust_remote_code=True, dtype="auto").eval()',
    ]
    lines.append(f"prompt = {ids}")
    if plain:
        lines = [
            "import torch",
            *lines,
            "logits = model(torch.tensor([prompt + 16 * [model.config.mask_token_id]])).logits[0, len(prompt) :]",
            "print(tokenizer.decode(prompt + logits.argmax(-1).tolist()))",
        ]
    else:
        lines.append(f"print(tokenizer.decode(model.generate([prompt], steps={steps}, seed=0)[0].token_ids))")
    return "\n".join(lines)


def _sampling(name: str, source: Source, facts: Facts | None, *, plain: bool) -> str:
    files = loading.tokenizer_files(source)
    if not files:
        return "The folder has no tokenizer, so the model takes and gives token ids."
    section = (facts.recipe.get("sampling") if facts else None) or {}
    prompt = next((text for text in section.get("prompts") or [] if text), "Once")
    template = "chat_template.jinja" in files or b'"chat_template"' in files.get("tokenizer_config.json", b"")
    chat = bool(section.get("chat")) and template and not plain
    steps = section.get("steps") or _STEPS
    code = sampling_code(name, prompt=prompt, chat=chat, steps=steps, plain=plain)
    after = (
        "That fills 16 masks in one look. LLaDA's own sampler, or `retrofit generate`, unmasks them in steps."
        if plain
        else "`order`, `temperature`, `counts` and `max_length` are further settings; a score means nothing "
        "without all of them."
    )
    return (
        f"`{name}` is this folder, or its id on the Hub. torch and transformers suffice. The folder brings its own "
        f"code, which you trust by loading it.\n\n```python\n{code}\n```\n\n{after}"
    )


# ---------------------------------------------------------------------------------------------------- data and training


def _data(facts: Facts | None, stated: Stated) -> str:
    lines = []
    if stated.datasets:
        ids = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in stated.datasets)
        lines.append(f"- Data sets: {ids}.")
    if facts and facts.data:
        sources = ", ".join(f"{_code(source.name)} ({source.rows:,} rows)" for source in facts.data.sources)
        split = facts.data.splits["train"]
        lines += [
            f"- Sources: {sources}.",
            f"- Prepared with the template {_code(facts.data.template)}: {split.documents:,} documents of "
            f"{split.tokens:,} tokens, the longest of {split.longest:,}, half of them up to {split.median_length:,}; "
            f"{facts.data.splits['held_out'].documents:,} more were held out.",
        ]
    elif not stated.datasets:
        lines.append("- The data were not at hand when this card was made.")
    lines.append(
        f"- Licence of the weights: {stated.license}."
        if stated.license
        else "- Licence of the weights: none was stated."
    )
    return "\n".join(lines)


def _training(facts: Facts | None) -> str:
    if facts is None:
        return "Nothing is known: the weights were exported from a folder that belongs to no run."
    rows: list[tuple[str, str]] = []
    objective, training = facts.recipe.get("objective") or {}, facts.recipe.get("training") or {}
    lora = facts.recipe.get("lora")
    trained = f"LoRA of rank {lora.get('r')}, merged" if lora else "all weights"
    rows.append(("objective", f"{objective.get('name')}, window {objective.get('window')}; trained: {trained}"))
    if facts.step is not None:
        rows.append(("steps", f"{facts.step:,} of {training.get('max_steps')}"))
    if facts.last:
        rows.append(("documents seen", f"{facts.last['documents']:,} ({training.get('documents_per_step')} a step)"))
        rows.append(("tokens seen", f"{facts.last['tokens']:,}"))
    if facts.machines:
        rows.append(("hardware", "; then ".join(map(_hardware, facts.machines))))
    if facts.processes:
        rows.append(("processes", str(facts.processes)))
    if facts.seconds:
        rows.append(
            ("time in steps", f"{format_seconds(facts.seconds)} (h:mm:ss or m:ss), without evaluation and saving")
        )
        if facts.watts:
            energy = facts.watts * facts.seconds / 3.6e6
            rows.append(("energy", f"about {energy:,.3g} kWh, an estimate: rated power of the devices times that time"))
    if facts.held_out:
        rows.append(("held-out loss", _held_out(facts.held_out[-1])))
    names = ("retrofit", "torch", "transformers", "accelerate", "peft", "deepspeed")
    versions = [f"{name} {facts.packages[name]}" for name in names if name in facts.packages]
    if versions:
        rows.append(("software", ", ".join(versions) + (f"; commit {facts.commit}" if facts.commit else "")))
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _hardware(machine: Mapping[str, Any]) -> str:
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or []]
    if not gpus:
        return f"CPU: {machine.get('cpu')}, {machine.get('cpu_count')} cores"
    return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) + " a machine"


def _held_out(record: Mapping[str, Any]) -> str:
    terms = ", ".join(f"{name} {record[name]:.4g}" for name in ("unmasking", "insertion") if _is_number(record, name))
    loss = f"{record['loss']:.4g}" if _is_number(record, "loss") else str(record.get("loss"))
    return f"{loss}{f' ({terms})' if terms else ''} at step {record['step']:,}, {record.get('documents')} documents"


def _is_number(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float)


def _folded_recipe(recipe: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = False
    yaml.width = 1_000_000
    stream = io.StringIO()
    yaml.dump(dict(recipe), stream)
    return f"<details>\n<summary>Recipe</summary>\n\n````yaml\n{stream.getvalue()}````\n\n</details>"


_LOSS_TEXT = (
    "Thin lines: training loss as logged; thick: its running mean; points: held-out documents. The two terms of a "
    "FlexMDM bound the negative log-likelihood together, but loosely: compare them between FlexMDMs only."
)
_LENGTHS_TEXT = (
    "Left: lengths of the samples that training drew on the way, for the prompts of the recipe. Right: lengths of the "
    "training documents. A few samples show whether lengths are of the right size, no more."
)


_CALIBRATION_TEXT = (
    "Each document that the loss was measured on, at its t, some tokens deleted: how many are missing, and how many "
    "the insertion head expects, summed over its gaps. Where it is calibrated, the means lie on the diagonal."
)


def _pictures(facts: Facts | None, gaps: list[tuple[float, float]]) -> dict[str, bytes]:
    """The pictures for which run and evaluations have recorded enough."""
    drawn: dict[str, bytes] = {}
    if gaps:
        expected, missing = zip(*gaps, strict=True)
        drawn[CALIBRATION] = pictures.png(pictures.calibration(expected, missing))
    if facts is None:
        return drawn
    losses = [record.get("loss") for record in (*facts.train, *facts.held_out)]
    if any(isinstance(loss, int | float) for loss in losses):
        drawn[LOSS] = pictures.png(pictures.loss_curve(facts.train, facts.held_out))
    samples = [
        (record["step"], len(record["token_ids"]))
        for record in facts.samples
        if isinstance(record.get("token_ids"), list)
    ]
    if samples and facts.data and facts.recipe.get("objective", {}).get("name") == "flexmdm":
        drawn[LENGTHS] = pictures.png(pictures.lengths(samples, facts.data.splits["train"].lengths))
    return drawn


# ---------------------------------------------------------------------------------------------------------- evaluation


def _evaluation(path: Path, source: Source, *, plain: bool) -> dict[str, Any]:
    """`settings.json` of an evaluation of what is exported.

    Raises:
        ValueError: there is none, it cannot be read, or it is of something else.
    """
    file = path / "settings.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        _scores(settings)  # every field that the card needs
        kind, digest = settings["model_type"], settings["checkpoint_digest"]
    except OSError as error:
        raise ValueError(
            f"--evaluation {path}: no settings.json there; make it with `retrofit evaluate --output DIR`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the settings of an evaluation ({type(error).__name__}: {error})") from error
    if kind != ("llada" if plain else "flexmdm"):
        raise ValueError(f"--evaluation {path}: scores a {kind}, which is not what is exported; leave it out")
    if digest != source.digest():
        raise ValueError(
            f"--evaluation {path}: is of other weights (digest {digest}) than those exported ({source.digest()}); "
            "evaluate these"
        )
    return dict(settings)


def _gaps(path: Path) -> list[tuple[float, float]]:
    """(expected, missing) tokens of each document of an evaluation of the loss; [] of any other.

    Raises:
        ValueError: the file is broken.
    """
    file = path / GAPS
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [(float(row["expected"]), float(row["missing"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not rows of expected and missing tokens ({error}); evaluate again") from error


def _scores(settings: Mapping[str, Any]) -> str:
    """A table of an evaluation, its settings, and the command that repeats it."""
    task, split, summary = settings["task"], settings["split"], settings["summary"]
    command = ["retrofit", "evaluate", "CHECKPOINT", "--task", task, "--data", "DATA", "--split", split]
    if settings["limit"] is not None:
        command += ["--limit", str(int(settings["limit"]))]
    if task == "maze":
        sampler = settings["sampler"]
        for option in ("steps", "order", "temperature", "seed"):
            command += [f"--{option}", str(sampler[option])] if option in sampler else []
        head = "| level | problems | solved | 95 % interval |\n| --- | --- | --- | --- |"
        rows = [
            f"| {level} | {found['problems']} | {100 * found['success']:.1f} % | "
            f"{100 * found['interval'][0]:.1f} to {100 * found['interval'][1]:.1f} % |"
            for level, found in summary["levels"].items()
        ]
        what = "Planning in a maze. Sampler: " + ", ".join(f"{key} {value}" for key, value in sampler.items()) + "."
    else:
        command += ["--seed", str(settings["seed"])]
        head = "| term | nats a document | standard error |\n| --- | --- | --- |"
        terms = summary["terms"].items()
        rows = [f"| {term} | {found['mean']:.3f} | {found['error']:.3f} |" for term, found in terms]
        what = f"Loss of {summary['documents']:,} documents, t uniform."
    table = "\n".join([head, *rows])
    digests = ", ".join(f"{name} `{str(digest)[:12]}`" for name, digest in settings["data"].items())
    return f"{what} SHA-256 of the data: {digests}.\n\n{table}\n\nRepeat it with `{shlex.join(map(str, command))}`."


# -------------------------------------------------------------------------------------------------------------- limits


def _limits(config: LLaDAConfig, *, plain: bool) -> str:
    lines = [
        "- It writes what its data make likely, true or not; nothing was done to make it safe or helpful beyond the "
        "data above.",
        f"- Positions end at {config.max_sequence_length:,} tokens. Only transformers was tried as a way to load it.",
    ]
    if not plain:
        lines.append(
            "- The number of sampling steps, the order and the temperature decide quality and length; scores hold for "
            "the settings beside them only."
        )
    lines.append("- What this card does not say was not recorded.")
    return "\n".join(lines)
