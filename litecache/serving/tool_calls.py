"""Calls of tools in what a model says, where its own format is known; and calls it must make.

The format is the chat template's: its text shows how calls of earlier turns are written. What
cannot be read as a call stays text, so that nothing a model says is lost. A call that is asked for
is a form: the format's marker and, by the schema of its parameters, what the tool is called with.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litecache.serving.answers import overlap
from litecache.serving.forms import FormSpec, lark_text
from litecache.serving.schemas import refused


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes its calls.

    Attributes:
        marker: begins a call; what stands before it is text.
        read: the calls in the text from there on; None = it holds none.
        grammar: of an answer that is one call, and of one that is one or more, where "MARKER" and
            "call" stand for themselves.
        key: of a call's arguments.
        at_start: an answer that begins with a brace is a call, too.
    """

    marker: str
    read: Callable[[str], list[dict[str, Any]] | None]
    grammar: tuple[str, str]
    key: str = "arguments"
    at_start: bool = False

    def form(
        self, functions: Mapping[str, Any], *, several: bool, special: Callable[[str], int | None]
    ) -> FormSpec:
        """Of an answer that calls some of these functions.

        Args:
            functions: schemas of their parameters, by name.
            several: more than one call may come.
            special: the id of a special token, None for what is none.
        """
        token = special(self.marker)
        marker = lark_text(self.marker) if token is None else f"<[{token}]>"
        spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        lines = ["start: " + self.grammar[several].replace("MARKER", marker)]
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
        for i, (name, schema) in enumerate(functions.items()):
            begin = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.key}": '
            # each schema is a document of its own: its references begin there
            own = json.dumps({"type": "object", **schema, "x-guidance": spaced})
            lines.append(f'call_{i}: {lark_text(begin)} args_{i} "}}"')
            lines.append(f"args_{i}: %json {own}")
        return FormSpec("lark", ("\n".join(lines), list(functions.values())), "tools")


def tool_format(template: str) -> ToolFormat | None:
    """The format of a chat template, None = unknown."""
    if "<tool_call>" in template and "<function=" not in template:
        return _HERMES
    if "[TOOL_CALLS]" in template:
        return _MISTRAL
    if "<|python_tag|>" in template or '"parameters":' in template.replace(" ", ""):
        return _LLAMA
    return None


def _calls(value: Any, key: str = "arguments") -> list[dict[str, Any]] | None:
    """What JSON says, if it is a call or a list of them."""
    items = value if isinstance(value, list) else [value]
    calls = []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get(key, item.get("arguments", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": item["name"], "arguments": arguments})
    return calls or None


def _json_calls(text: str, key: str = "arguments") -> list[dict[str, Any]] | None:
    try:
        return _calls(json.JSONDecoder().raw_decode(text.strip())[0], key)
    except (ValueError, RecursionError):
        return None


def _read_hermes(text: str) -> list[dict[str, Any]] | None:
    calls: list[dict[str, Any]] = []
    for body in re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL):
        found = _json_calls(body)
        if found is None:
            return None
        calls += found
    return calls or None


def _read_llama(text: str) -> list[dict[str, Any]] | None:
    calls: list[dict[str, Any]] = []
    text = text.strip().removeprefix("<|python_tag|>").strip()
    for part in re.split(r"(?<=\})\s*;\s*(?=\{)", text):
        found = _json_calls(part, "parameters")
        if found is None:
            return None
        calls += found
    return calls or None


def asked_functions(tools: Sequence[Mapping[str, Any]], choice: Any) -> dict[str, Any]:
    """The functions of which `tool_choice` asks for a call: schemas of parameters by name.

    Raises:
        ApiError: 400, the choice or a tool is malformed, or it names none of the tools.
    """
    functions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        given = tool.get("function")
        function = given if isinstance(given, dict) else {}
        name = function.get("name")
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise refused(f"tools[{index}]", "a function with a name, where a call is forced")
        schema = function.get("parameters")
        if schema is None:  # then it takes none
            schema = {"properties": {}, "additionalProperties": False}
        if not isinstance(schema, dict):
            raise refused(f"tools[{index}].function.parameters", "a JSON schema")
        functions[name] = schema
    if choice == "required":
        return functions
    asked = choice if isinstance(choice, dict) else {}
    named = asked.get("function")
    name = named.get("name") if isinstance(named, dict) else None
    if asked.get("type") != "function" or not isinstance(name, str) or name not in functions:
        valid = '"none", "auto", "required" or {"type": "function", "function": {"name": NAME}}'
        raise refused("tool_choice", f"{valid}, NAME one of {', '.join(functions)}"[:1000])
    return {name: functions[name]}


_HERMES_CALL = r'MARKER "\n" call "\n</tool_call>"'
_HERMES = ToolFormat(
    "<tool_call>",
    _read_hermes,
    (_HERMES_CALL, rf'{_HERMES_CALL} ("\n" {_HERMES_CALL})*'),
)
_MISTRAL = ToolFormat(
    "[TOOL_CALLS]",
    lambda text: _json_calls(text.removeprefix("[TOOL_CALLS]")),
    ('MARKER "[" call "]"', 'MARKER "[" call (", " call)* "]"'),
)
# several calls stand for themselves there: "call; call" is read, and not asked for
_LLAMA = ToolFormat("<|python_tag|>", _read_llama, ("call", "call"), "parameters", at_start=True)


class CallFinder:
    """Parts text from calls as an answer comes: from the first marker on nothing is text.

    Args:
        format: of the model; None = all is text.
    """

    def __init__(self, format: ToolFormat | None) -> None:
        self._format = format
        self._held = ""
        self._calling = self._spoken = False

    def add(self, text: str) -> str:
        """What of it is text for certain."""
        if self._format is None:
            return text
        self._held += text
        if self._calling:
            return ""
        if self._format.at_start and not self._spoken:
            begin = self._held.lstrip()
            if not begin or begin.startswith("{"):
                self._calling = bool(begin)
                return ""
        at = self._held.find(self._format.marker)
        if at >= 0:
            self._calling = True
        else:
            at = len(self._held) - overlap(self._held, self._format.marker)
        found, self._held = self._held[:at], self._held[at:]
        self._spoken = self._spoken or bool(found)
        return found

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls as OpenAI writes them."""
        held, self._held = self._held, ""
        calls = self._format.read(held) if self._format is not None and self._calling else None
        if not calls:
            return held, []
        return "", [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for call in calls
        ]
