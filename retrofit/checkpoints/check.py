"""`retrofit check`: whether a folder will load, from its headers and small files alone."""

from __future__ import annotations

from pathlib import Path

from retrofit.flexmdm import FlexMDMConfig

from . import loading


def check(path: Path) -> None:
    """Prints what the folder is, in three lines; reads no weights.

    Args:
        path: anything that `loading.resolve` finds on this machine.

    Raises:
        ValueError: it will not load: the file, tensor or field that keeps it from that is named.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    source = loading.resolve(path)
    config = loading.model_config(source)
    model, _ = loading.build(source, config, verify=False)
    sizes = [(parameter.numel(), parameter.nbytes) for parameter in model.parameters()]
    count, size = (sum(values) for values in zip(*sizes, strict=True))
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    kind = "FlexMDM" if isinstance(config, FlexMDMConfig) else "LLaDA"
    under = f", an adapter on {loading.base_of(source).directory}" if source.kind == "adapter" else ""
    print(f"loads     {source.directory}: {kind}, {count:,} parameters{under}")
    print(
        f"weights   {size / 1e6:,.0f} MB as {' and '.join(dtypes)}; not read, so not verified (see `retrofit verify`)"
    )
    if loading.tokenizer_directory(source) is None:
        print("tokenizer none; generate, evaluate and preprocess need one")
    else:
        print(f"tokenizer {len(loading.load_tokenizer(source)):,} tokens, {config.vocab_size:,} rows of embedding")
