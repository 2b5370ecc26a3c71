"""The command line: one parser, one small function per verb.

Nothing heavy is imported before a verb runs, so that every `--help` answers at once. A user's error (ValueError,
OSError, a package that is not installed) is one line on stderr and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from retrofit import __version__
from retrofit.credentials import mask_tokens

USER_ERROR, INTERRUPTED = 2, 130

# Import name of each optional package -> the extra of setup.cfg that installs it.
EXTRAS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard", "lm_eval": "eval"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parse(arguments)
    except ValueError as error:
        return _fail(str(error))
    _quiet_libraries()
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (`| head`) has had enough
    except KeyboardInterrupt:
        if options.debug:
            raise
        return _fail("interrupted", INTERRUPTED)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        return _fail(_message(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if options.debug or name in ("", "retrofit"):
            raise
        extra = f"'retrofit[{EXTRAS[name]}]'" if name in EXTRAS else name
        return _fail(f"package {name} is not installed; install it with: pip install {extra}")
    return 0


def _quiet_libraries() -> None:
    """Keeps transformers' warnings off the terminal, and progress bars out of log files; the user's settings win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str, code: int = USER_ERROR) -> int:
    print(mask_tokens(f"retrofit: error: {message}"), file=sys.stderr)
    return code


def _message(error: Exception) -> str:
    """What the error says; for those of the operating system the file and the reason, without the error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip() or type(error).__name__


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; `run` is the verb's function. Unusable arguments are a ValueError."""
    parser = build_parser()
    if arguments[:1] not in (["train"], ["validate"], ["estimate"]):
        return parser.parse_args(arguments)
    arguments, overrides = split_overrides(arguments)
    options, unknown = parser.parse_known_args(arguments)
    options.overrides = overrides + unknown  # the recipe's reader says what is wrong with the unknown ones
    return options


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--section.field value` and `--section.field=value` from the other arguments."""
    others, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or "." not in argument.partition("=")[0]:
            others.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument:
            overrides += [value for value in [next(remaining, None)] if value is not None]
    return others, overrides


class _Parser(argparse.ArgumentParser):
    """argparse's parser with our errors: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


class _NoToken(argparse.Action):
    """Refuses a token on the command line, where other users and the shell's history see it."""

    def __call__(self, *_: object) -> NoReturn:
        raise ValueError("a token is not taken from the command line; log in with `hf auth login`, and revoke that one")


class _TrainHelp(argparse.Action):
    """`retrofit train --help`: the recipe's fields come from the recipe itself, loaded only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from retrofit.recipe import describe_fields

        parser.print_help()
        print("\nfields of a recipe, each also an option --section.field (required where no default is shown):")
        for name, kind, meaning in describe_fields():
            print(f"  {name}: {kind}\n      {meaning}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="retrofit",
        description="Turns LLaDA, a masked-diffusion language model, into one that writes any length in any order.",
        epilog="example:\n  retrofit init toy && retrofit generate toy --prompt 'Once' --answer-length 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"retrofit {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], help: str, example: str, add_help: bool = True
    ) -> _Parser:
        added = verbs.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run)
        return added

    _add_init(
        verb(
            "init",
            _init,
            "draw a small random LLaDA with a byte tokenizer",
            "retrofit init toy --layers 4 --d-model 128",
        )
    )
    _add_preprocess(
        verb(
            "preprocess",
            _preprocess,
            "turn JSONL, text or a data set of the Hub into a token store",
            "retrofit preprocess train.jsonl --out store --tokenizer toy --template gsm8k --max-length 512",
        )
    )
    _add_train(
        verb(
            "train",
            _train,
            "train by a recipe; where its run directory holds a run, go on with it",
            "retrofit train recipe.yaml --training.max_steps 1000 --optimizer.learning_rate 1e-4\n"
            "  accelerate launch --config_file launch/accelerate/ddp.yaml -m retrofit.train recipe.yaml",
            add_help=False,
        )
    )
    _add_launch(
        verb(
            "validate",
            _validate,
            "check a recipe, its launch, data, model and disk before the run stands in a queue",
            "retrofit validate recipe.yaml --launch launch/accelerate/ddp.yaml --num_processes 2",
        )
    )
    _add_estimate(
        verb(
            "estimate",
            _estimate,
            "say what a run will need: memory of a rank by part, the largest token budget, sizes of checkpoints",
            "retrofit estimate recipe.yaml --launch launch/accelerate/ddp.yaml --num_processes 16 --memory 80",
        )
    )
    _add_verify(
        verb(
            "verify", _verify, "say which checkpoints of a run are good, and why others are not", "retrofit verify run"
        )
    )
    _add_check(verb("check", _check, "say whether a folder will load, and if not why", "retrofit check LLaDA-8B-Base"))
    _add_generate(
        verb(
            "generate",
            _generate,
            "write text with a checkpoint: free, after a prompt, or in a hole",
            "retrofit generate run/final --prefix 'She has ' --suffix ' apples left.' --steps 64 --num 4",
        )
    )
    _add_evaluate(
        verb(
            "evaluate",
            _evaluate,
            "score a checkpoint",
            "retrofit evaluate run/final --task loss --data store --output scores",
        )
    )
    _add_import_reference(
        verb(
            "import-reference",
            _import_reference,
            "make a checkpoint of the published FlexMDM code ours",
            "retrofit import-reference pytorch_model.bin imported --base GSAI-ML/LLaDA-8B-Base",
        )
    )
    _add_whole(
        verb(
            "merge",
            _merge,
            "write the whole weights that an adapter and its base make",
            "retrofit merge run/final merged",
        )
    )
    export = verb(
        "export",
        _export,
        "write a folder that loads with torch and transformers alone",
        "retrofit export run/final flexmdm --shard-size 2GB",
    )
    _add_whole(export)
    export.add_argument(
        "--base-only", action="store_true", help="write a plain LLaDA: time conditioning and insertion head left out"
    )
    _add_card(export)
    _add_push(
        verb(
            "push",
            _push,
            "put a model on the Hub, private unless told otherwise, and read it back",
            "retrofit push exported me/llada-flex --branch step-00001000",
        )
    )
    _add_env(verb("env", _env, "print versions, hardware and source revision", "retrofit env --json"))
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the example as written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if hidden or not action.option_strings else f"{action.help} (default: %(default)s)"


# ----------------------------------------------------------------------------------------------------------------- init


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", type=Path, help="directory to write, in the released layout")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--d-model", type=int, default=128, help="width")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--kv-heads", type=int, help="key/value heads (default: heads)")
    parser.add_argument("--mlp-hidden", type=int, help="hidden width of the MLP (default: 3 times d-model)")
    parser.add_argument("--vocab-size", type=int, default=264, help="rows of the embedding, at least 262")
    parser.add_argument("--max-sequence-length", type=int, default=512, help="longest sequence, in tokens")
    parser.add_argument("--tied", action="store_true", help="tie the LM head to the embedding")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def _init(options: argparse.Namespace) -> None:
    from retrofit.data.tiny import init

    init(
        options.dest,
        layers=options.layers,
        d_model=options.d_model,
        heads=options.heads,
        kv_heads=options.kv_heads,
        mlp_hidden=3 * options.d_model if options.mlp_hidden is None else options.mlp_hidden,
        vocab_size=options.vocab_size,
        max_sequence_length=options.max_sequence_length,
        tied=options.tied,
        seed=options.seed,
    )


# ----------------------------------------------------------------------------------------------------------- preprocess


def _add_preprocess(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="JSONL or text file, or id of a data set on the Hub"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the token store to write")
    parser.add_argument("--tokenizer", required=True, help="model directory or Hub id whose tokenizer is used")
    parser.add_argument(
        "--template", required=True, help="text, chat, gsm8k, infilling or spans: how a row becomes tokens"
    )
    parser.add_argument("--max-length", type=int, required=True, help="longest document, in tokens")
    parser.add_argument("--held-out", type=float, default=0.01, help="fraction of the documents that is held out")
    parser.add_argument("--max-rejected", type=float, default=0.1, help="fraction of bad rows above which to refuse")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out split")
    parser.add_argument("--revision", help="branch, tag or commit of the tokenizer on the Hub")
    parser.add_argument("--dataset-config", help="configuration of a data set on the Hub, for example main")
    parser.add_argument("--dataset-split", default="train", help="split of a data set on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing token store")


def _preprocess(options: argparse.Namespace) -> None:
    from retrofit.data.preprocess import preprocess

    preprocess(
        options.sources,
        options.out,
        tokenizer=options.tokenizer,
        template=options.template,
        max_length=options.max_length,
        held_out=options.held_out,
        max_rejected=options.max_rejected,
        seed=options.seed,
        revision=options.revision,
        dataset_config=options.dataset_config,
        dataset_split=options.dataset_split,
        overwrite=options.overwrite,
    )


# ---------------------------------------------------------------------------------------------------------------- train


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    parser.add_argument("-h", "--help", action=_TrainHelp, nargs=0, help="show this help and the fields of a recipe")
    parser.add_argument(
        "--resume_from", metavar="PATH", help="run, checkpoint or bare step to go on from (default: newest good one)"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew; what the run directory holds is moved aside")
    parser.add_argument(
        "--override",
        metavar="FIELD",
        action="append",
        default=[],
        help="go on although section.field differs from the run's; recorded; may be repeated",
    )
    parser.usage = (
        "retrofit train RECIPE [--section.field VALUE ...] [--resume_from PATH | --fresh] [--override FIELD] [--debug]"
    )


def _train(options: argparse.Namespace) -> None:
    from retrofit.recipe import load_recipe
    from retrofit.training.guard import SignalGuard
    from retrofit.training.outcome import Outcome

    with Outcome() as outcome, SignalGuard() as guard:  # before torch, whose import takes long enough for a signal
        try:
            recipe = load_recipe(options.recipe, options.overrides)  # before torch: refused at once
        except (ValueError, OSError):
            if os.environ.get("RANK", "0") != "0":
                raise SystemExit(USER_ERROR) from None  # all ranks read the same file: rank 0 says what is wrong
            raise

        from retrofit.training.loop import train
        from retrofit.training.opening import Request

        request = Request(options.resume_from, options.fresh, tuple(options.override))
        train(recipe, request, outcome=outcome, guard=guard)


# ---------------------------------------------------------------------------------------- validate, estimate and verify


def _positive(text: str) -> float:
    """A positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return number


def _count(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or not 0 < int(text) < 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file; --section.field VALUE as for train")
    parser.add_argument("--launch", metavar="FILE", type=Path, help="accelerate config (default: one process)")
    parser.add_argument(
        "--num_processes",
        "--num-processes",
        metavar="N",
        type=_count,
        help="processes of all machines (default: FILE's)",
    )


def _validate(options: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: what the cache has is checked
    from retrofit.validate import validate

    validate(options.recipe, options.overrides, launch=options.launch, num_processes=options.num_processes)


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    _add_launch(parser)
    parser.add_argument(
        "--memory", metavar="GB", type=_positive, help="of one device, in 1e9 bytes (default: this machine's)"
    )


def _estimate(options: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from retrofit.estimate import estimate

    estimate(
        options.recipe,
        options.overrides,
        launch=options.launch,
        num_processes=options.num_processes,
        memory=options.memory,
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="run directory, checkpoint or final/")


def _verify(options: argparse.Namespace) -> None:
    from retrofit.checkpoints.verify import verify

    verify(options.path)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FOLDER", type=Path, help="run, checkpoint, adapter or model directory")


def _check(options: argparse.Namespace) -> None:
    from retrofit.checkpoints.check import check

    check(options.path)


# ------------------------------------------------------------------------------------------------------------- generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run, checkpoint, adapter or merged directory, or Hub id"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="text to go on from; may be repeated")
    parser.add_argument("--chat", action="store_true", help="the prompts are questions: wrap them in the chat template")
    parser.add_argument("--prefix", metavar="TEXT", help="text before a hole to be filled")
    parser.add_argument("--suffix", metavar="TEXT", help="text after a hole to be filled")
    parser.add_argument("--num", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 128; an MDM: its answer length)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 1; an MDM: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument("--order", choices=("random", "confidence"), help="which masks come first (default: random)")
    parser.add_argument("--counts", choices=("binomial", "poisson"), help="law of insertions (default: binomial)")
    parser.add_argument("--max-length", type=int, help="longest sequence, prompt included (default: the model's)")
    parser.add_argument("--answer-length", type=int, help="MDM: tokens of the window after the prompt, required")
    parser.add_argument("--block-length", type=int, help="MDM: tokens of a block (default: the whole window)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSONL file to write instead of printing the texts")


def _generate(options: argparse.Namespace) -> None:
    from retrofit.generate import generate

    generate(
        options.checkpoint,
        revision=options.revision,
        prompts=options.prompt,
        chat=options.chat,
        prefix=options.prefix,
        suffix=options.suffix,
        num=options.num,
        steps=options.steps,
        temperature=options.temperature,
        seed=options.seed,
        order=options.order,
        counts=options.counts,
        max_length=options.max_length,
        answer_length=options.answer_length,
        block_length=options.block_length,
        output=options.output,
    )


# ------------------------------------------------------------------------------------------------------------- evaluate


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run, checkpoint, adapter or merged directory, or Hub id"
    )
    parser.add_argument("--task", choices=("loss", "maze"), required=True, help="what is scored")
    parser.add_argument("--data", type=Path, required=True, help="token store (loss) or directory of problems (maze)")
    parser.add_argument("--split", default="held_out", help="of a token store: train, held_out; of a maze: tune, eval")
    parser.add_argument("--limit", type=int, help="score only this many (default: all)")
    parser.add_argument("--steps", type=int, default=128, help="sampling steps")
    parser.add_argument("--order", choices=("random", "confidence"), default="random", help="which masks come first")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 1; an MDM: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument("--output", metavar="DIR", type=Path, help="directory for the score with its settings")


def _evaluate(options: argparse.Namespace) -> None:
    from retrofit.evaluation import evaluate

    evaluate(
        options.checkpoint,
        task=options.task,
        data=options.data,
        split=options.split,
        limit=options.limit,
        steps=options.steps,
        order=options.order,
        temperature=options.temperature,
        seed=options.seed,
        output=options.output,
    )


# ----------------------------------------------------------------------------------------------------- merge and export


def _add_whole(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="run, checkpoint, adapter or merged directory, or Hub id")
    parser.add_argument("dest", metavar="DEST", type=Path, help="directory to write; must not exist")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="largest file of weights")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the backbone's own)"
    )


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card, as the Hub calls it: apache-2.0")
    parser.add_argument(
        "--base-model", metavar="ID", help="Hub id of the base, if training started from a copy on disk"
    )
    parser.add_argument(
        "--dataset", metavar="ID", action="append", default=[], help="Hub id of training data (may be repeated)"
    )
    parser.add_argument(
        "--evaluation",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="scores that `retrofit evaluate --output DIR` wrote (may be repeated)",
    )


def _merge(options: argparse.Namespace) -> None:
    from retrofit.hub.merge import merge

    merge(
        options.source,
        options.dest,
        revision=options.revision,
        shard_size=options.shard_size,
        dtype=options.dtype,
    )


def _export(options: argparse.Namespace) -> None:
    from retrofit.hub.card import Stated
    from retrofit.hub.export import export

    stated = Stated(options.base_model, options.license, tuple(options.dataset), tuple(options.evaluation))
    export(
        options.source,
        options.dest,
        revision=options.revision,
        shard_size=options.shard_size,
        dtype=options.dtype,
        base_only=options.base_only,
        stated=stated,
    )


# ----------------------------------------------------------------------------------------------------------------- push


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="exported model, adapter, or checkpoint with all weights"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub; made if it is not there")
    parser.add_argument("--branch", default="main", help="made if it is not there, for example step-00001000")
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that is made")
    parser.add_argument("--overwrite", action="store_true", help="the branch may hold another model, which is replaced")
    parser.add_argument("--message", help="of the commit (default: run and step, or the folder's name)")
    parser.add_argument("--yes", action="store_true", help="do not ask after showing what will be done")
    parser.add_argument(
        "--verify",
        choices=("download", "digests", "sample"),
        default="download",
        help="download every file again; or believe the Hub's digests; or download, load and sample",
    )
    parser.add_argument("--token", action=_NoToken, nargs="?", help=argparse.SUPPRESS)


def _push(options: argparse.Namespace) -> None:
    from retrofit.hub.push import push

    push(
        options.folder,
        options.repo_id,
        branch=options.branch,
        public=options.public,
        overwrite=options.overwrite,
        message=options.message,
        yes=options.yes,
        verify=options.verify,
    )


# ------------------------------------------------------------------------------------------------------------------ env


def _add_import_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help=".bin or .safetensors file, or a directory of them")
    parser.add_argument("dest", metavar="DEST", type=Path, help="directory to write, LoRA merged")
    parser.add_argument("--base", help="LLaDA that was fine-tuned: directory or Hub id (default: SOURCE itself)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--insertion-schedule",
        choices=("geometric", "linear"),
        default="geometric",
        help="that it was trained with, which no file says; the published training code draws from the geometric one",
    )
    parser.add_argument("--lora-alpha", type=float, help="of the LoRA factors (default: their rank, as the paper's)")
    parser.add_argument("--max-gap", type=float, default=1024.0, help="factor of the length head's softplus")


def _import_reference(options: argparse.Namespace) -> None:
    from retrofit.hub.reference import import_reference

    written = import_reference(
        options.source,
        options.dest,
        base=options.base,
        revision=options.revision,
        insertion_schedule=options.insertion_schedule,
        lora_alpha=options.lora_alpha,
        max_gap=options.max_gap,
    )
    print(f"written   {written}")


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, as environment.json of a run")


def _env(options: argparse.Namespace) -> None:
    from retrofit.environment import environment, format_environment

    record = environment()
    print(json.dumps(record, indent=2) if options.json else format_environment(record))
