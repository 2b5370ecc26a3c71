"""The metadata in front of a model card, checked here by the rules that the Hub has for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

PAPER = "2509.01025"

# The identifiers that the Hub has for licences; any other has to be called `other`.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
    lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())


def check_license(place: str, value: str) -> None:
    """Refuses what is no identifier of a licence (ValueError, naming place and value)."""
    if value not in LICENSES:
        alike = value.lower().replace(" ", "-").removesuffix(".0")
        near = difflib.get_close_matches(alike, sorted(LICENSES), 1, 0.5)
        hint = f"perhaps {near[0]}, or else `other`" if near else "choose one, or `other`"
        raise ValueError(f"{place}: {value!r} is not a licence that the Hub knows by that name; {hint}")


def check_hub_id(place: str, value: str) -> None:
    """Refuses what cannot be a model or data set on the Hub, local paths above all (ValueError)."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        raise ValueError(
            f"{place}: {value!r} is not the id of anything on the Hub; give owner/name, or leave it out"
        ) from None


def card_data(
    *,
    name: str,
    base_model: str | None,
    license: str | None,
    datasets: Sequence[str],
    evaluations: Sequence[Mapping[str, Any]],
    data_digest: str | None,
    is_flexmdm: bool,
) -> ModelCardData:
    """The metadata of a card.

    Args:
        name: of the model, for its scores.
        base_model, datasets: ids on the Hub.
        evaluations: `settings.json` of each evaluation.
        data_digest: of the manifest of the training data, if it is known.
    """
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base_model else {}
    results = [result for settings in evaluations for result in _results(settings, datasets, data_digest)]
    return ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(["flexmdm"] if is_flexmdm else []), "llada", "masked-diffusion", "retrofit", f"arxiv:{PAPER}"],
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def _results(settings: Mapping[str, Any], datasets: Sequence[str], data_digest: str | None) -> list[EvalResult]:
    """An evaluation's scores: solved problems of each level, or nats a document of each term."""
    summary = settings["summary"]
    common: dict[str, Any] = {"task_type": "text-generation", "task_name": "text generation"}
    if settings["task"] == "maze":
        return [
            EvalResult(
                **common,
                dataset_type="maze",
                dataset_name=f"Maze, {level}",
                dataset_config=level,
                dataset_split=settings["split"],
                metric_type="accuracy",
                metric_name=f"problems solved, % ({settings['sampler']['steps']} steps)",
                metric_value=round(100 * found["success"], 2),
                metric_args=dict(settings["sampler"]),
            )
            for level, found in summary["levels"].items()
        ]
    is_of_training = data_digest is not None and settings["data"].get("manifest") == data_digest
    return [
        EvalResult(
            **common,
            dataset_type=datasets[0] if is_of_training and len(datasets) == 1 else "prepared-documents",
            dataset_name="training data" if is_of_training else "prepared documents",
            dataset_split=settings["split"],
            metric_type="loss",
            metric_name=f"{term} loss, nats a document",
            metric_value=round(found["mean"], 4),
        )
        for term, found in summary["terms"].items()
    ]


def base_model_of(config_file: Path, recorded: str | None, revision: str | None, stated: str | None) -> str | None:
    """The Hub id of what a model was made from: that in its configuration, or else what the user states.

    Local bases stand in a configuration by their last name alone: without owner and revision a name is no id.

    Raises:
        ValueError: the configuration has a path, or the id of another model than is stated.
    """
    is_id = recorded is not None and (revision is not None or "/" in recorded or "\\" in recorded)
    if not is_id or recorded is None:
        return stated
    try:
        check_hub_id(f"{config_file}: base_model", recorded)
    except ValueError as error:
        if stated is None:
            raise ValueError(f"{error} or say it with --base-model") from None
        return stated
    if stated not in (None, recorded):
        raise ValueError(f"--base-model: {stated!r}, but {config_file} says {recorded!r}; leave the option out")
    return recorded
