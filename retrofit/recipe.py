"""Reads a recipe from YAML and the command line, and writes a resolved one back.

A recipe is one YAML file with a mapping per section (`retrofit.sections` has the fields). `load_recipe` reports *all*
problems of a file at once, one line each: the place, the field, what is wrong and how to mend it. Nothing unknown is
dropped and no text is taken for a number.

YAML 1.2 (ruamel.yaml) is read, where `1e-4` is a number; PyYAML reads it as text and keeps the last of a duplicate key.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from retrofit.credentials import holds_token, mask, mask_tokens
from retrofit.sections import OPTIONAL_SECTIONS, SECTIONS, Recipe

__all__ = ["Recipe", "describe_fields", "dump_recipe", "load_recipe"]


def describe_fields() -> Iterator[tuple[str, str, str]]:
    """(`section.field`, `type = default`, meaning) of every field, in the recipe's order."""
    for section in SECTIONS:
        for name, info in _fields(section).items():
            default = "" if info.is_required() else f" = {json.dumps(info.get_default(call_default_factory=True))}"
            yield f"{section}.{name}", _type_name(info.annotation) + default, info.description or ""


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Entry:
    """One value given for a field, and where: `file:line`, or `command line`."""

    value: Any
    place: str


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides of the form `--section.field value` or `--section.field=value`.

    An override's value is read as YAML where the field is not text, so `1e-4`, `null` and `[q_proj, v_proj]` work.

    Raises:
        ValueError: with every problem found, one line each: place, field, what is wrong, how to mend it.
        OSError: if the file cannot be read.
    """
    reader = _Reader(path)
    reader.read_file()
    reader.read_overrides(overrides)
    recipe = reader.build()
    if recipe is None:
        raise ValueError("\n".join(map(mask_tokens, reader.problems)))
    return recipe


class _Reader:
    """Collects entries by section and field, and problems with their places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.entries: dict[str, dict[str, _Entry]] = {}
        self.section_places: dict[str, str] = {}
        self.yaml = YAML(typ="safe", pure=True)

    def problem(self, place: str, text: str) -> None:
        self.problems.append(f"{place}: {text}")

    def place(self, node: Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    # ---- the file

    def read_file(self) -> None:
        try:
            root = self.yaml.compose(self.path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
        except YAMLError as error:
            raise ValueError(mask_tokens(f"{self.path}{_yaml_problem(error)}")) from error
        if root is None:
            raise ValueError(f"{self.path}: the recipe is empty; it needs the sections {', '.join(_required())}")
        if not isinstance(root, MappingNode):
            raise ValueError(f"{self.place(root)}: expected sections such as `model:` at the top level of a recipe")
        for section, key, value in self.pairs(root, "the recipe"):
            if section not in SECTIONS:
                self.problem(self.place(key), _unknown_section(section))
            elif isinstance(value, MappingNode):
                self.section_places[section] = self.place(key)
                self.read_section(section, value)
            elif section in OPTIONAL_SECTIONS and self.construct(value) is None:
                pass  # `lora:` or `lora: null`, as dump_recipe writes it: as if left out
            else:
                self.section_places[section] = self.place(key)
                self.problem(self.place(key), f"{section}: expected a section with keys, found {_describe_node(value)}")

    def read_section(self, section: str, node: MappingNode) -> None:
        entries = self.entries.setdefault(section, {})
        for name, key, value in self.pairs(node, f"section {section}"):
            if name in _names(section):
                try:
                    entries[name] = _Entry(self.construct(value), self.place(key))
                except YAMLError as error:
                    entries[name] = _Entry(_UNREADABLE, self.place(key))
                    self.problems.append(f"{self.path}{_yaml_problem(error)}")
            else:
                self.problem(self.place(key), _unknown_key(section, name))

    def pairs(self, node: MappingNode, where: str) -> Iterator[tuple[str, Node, Node]]:
        """The mapping's (name, key, value), with duplicates reported and left out."""
        first: dict[str, Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else "?"
            if name in first:
                line = first[name].start_mark.line + 1
                self.problem(self.place(key), f"duplicate key {name} in {where}, first given in line {line}; keep one")
            else:
                first[name] = key
                yield name, key, value

    def construct(self, node: Node) -> Any:
        return self.yaml.constructor.construct_object(node, deep=True)

    # ---- the command line

    def read_overrides(self, overrides: Sequence[str]) -> None:
        given: set[str] = set()
        remaining = iter(overrides)
        for argument in remaining:
            flag, equals, text = argument.partition("=")
            if not re.fullmatch(r"--[^\s.]+\.\S+", flag):
                if argument.startswith("--") and not equals:
                    next(remaining, None)
                self.problem("command line", f"expected --section.field value, found {argument}{_flag_hint(flag)}")
                continue
            if not equals:
                text = next(remaining, "\0")
            section, _, name = flag[2:].partition(".")
            if text == "\0":
                self.problem("command line", f"{flag} has no value")
            elif section not in SECTIONS:
                self.problem("command line", _unknown_section(section))
            elif name not in _names(section):
                self.problem("command line", _unknown_key(section, name))
            elif flag in given:
                self.problem("command line", f"{flag} is given twice; keep one")
            else:
                given.add(flag)
                entry = _Entry(self.parse(section, name, text), "command line")
                self.entries.setdefault(section, {})[name] = entry

    def parse(self, section: str, name: str, text: str) -> Any:
        """Text fields take the argument as it stands (a directory may be called 2024); all others read it as YAML."""
        expected = _type_name(_fields(section)[name].annotation)
        if expected == "text" or (expected == "text or null" and text != "null"):
            return text
        try:
            return YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            self.problem("command line", f"--{section}.{name}: not a YAML value ({problem})")
            return _UNREADABLE

    # ---- the recipe

    def build(self) -> Recipe | None:
        """The recipe, or None if there are problems."""
        sections = {name: self.build_section(name) for name in SECTIONS}
        if self.problems:
            return None
        try:
            return Recipe(**{name: section for name, section in sections.items() if section is not None})
        except ValidationError as error:
            for detail in error.errors():
                self.problem(str(self.path), _reason(detail["msg"]))
            return None

    def build_section(self, section: str) -> Any:
        place = self.section_places.get(section, str(self.path))
        if section not in self.entries:
            if section not in OPTIONAL_SECTIONS and section not in self.section_places:
                required = ", ".join(_required_keys(section))
                self.problem(place, f"section {section} is missing; it needs {required}")
            return None
        entries = self.entries[section]
        try:
            return SECTIONS[section](**{name: entry.value for name, entry in entries.items()})
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0]) if detail["loc"] else ""
                entry = entries.get(name)
                if entry and entry.value is _UNREADABLE:
                    continue  # reported when it was read
                where = entry.place if entry else place
                self.problem(where, _field_problem(section, detail))
        return None


_UNREADABLE = object()
"""Stands for a value that could not be read and has been reported."""


# ------------------------------------------------------------------------------------------------------------- messages


def _fields(section: str) -> dict[str, FieldInfo]:
    return SECTIONS[section].__pydantic_fields__  # type: ignore[attr-defined]


def _names(section: str) -> list[str]:
    return list(_fields(section))


def _required() -> list[str]:
    return [section for section in SECTIONS if section not in OPTIONAL_SECTIONS]


def _required_keys(section: str) -> list[str]:
    return [name for name, info in _fields(section).items() if info.is_required()]


def _nearest(word: str, candidates: Sequence[str]) -> tuple[str, float]:
    """The candidate most like `word`, and how alike they are (0 to 1)."""
    word = word.lower().replace("-", "_")
    scored = [
        (difflib.SequenceMatcher(None, word, candidate.rpartition(".")[2]).ratio(), candidate)
        for candidate in candidates
    ]
    ratio, candidate = max(scored)
    return candidate, ratio


def _owners(name: str) -> list[str]:
    return [section for section in SECTIONS if name in _names(section)]


def _unknown_key(section: str, name: str) -> str:
    text = f"unknown key {name} in section {section}"
    owners = _owners(name.replace("-", "_"))
    if owners and section not in owners:
        return f"{text}; it is a key of section {' and of '.join(owners)}: move it there"
    nearest, ratio = _nearest(name, _names(section))
    elsewhere, other_ratio = _nearest(name, [f"{other}.{key}" for other in SECTIONS for key in _names(other)])
    return f"{text}; nearest known key: {elsewhere if other_ratio > max(ratio, 0.7) else nearest}"


def _unknown_section(name: str) -> str:
    text = f"unknown section {name} at top level"
    if owners := _owners(name.replace("-", "_")):
        return f"{text}; it is a key of section {' and of '.join(owners)}: move it there"
    nearest, ratio = _nearest(name, list(SECTIONS))
    key, key_ratio = _nearest(name, [f"{section}.{key}" for section in SECTIONS for key in _names(section)])
    return f"{text}; nearest known {f'key: {key}' if key_ratio > ratio else f'section: {nearest}'}"


def _flag_hint(flag: str) -> str:
    name = flag.lstrip("-")
    if owners := _owners(name.replace("-", "_")):
        return f"; write --{owners[0]}.{name.replace('-', '_')}"
    return ""


def _yaml_problem(error: YAMLError) -> str:
    """`:line: what`, from ruamel's several lines."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        problem = re.sub(r" with value .*", "", str(error.problem))
        return f":{error.problem_mark.line + 1}: {problem}" + (f" {error.context}" if error.context else "")
    return f": {str(error).splitlines()[0]}"


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
}


def _field_problem(section: str, detail: Mapping[str, Any]) -> str:
    """One line for one of pydantic's error records."""
    kind, location, found = detail["type"], detail["loc"], detail["input"]
    if not location:
        return f"{section}: {_reason(detail['msg'])}"
    name = f"{section}.{location[0]}" + "".join(f"[{part}]" for part in location[1:] if isinstance(part, int))
    if kind == "missing":
        return f"{name} is missing; the section needs it"
    if kind in _EXPECTED:
        hint = ""
        if kind == "list_type" and isinstance(found, str) and not holds_token(found):
            hint = f"; write [{found}]"
        return f"{name}: expected {_EXPECTED[kind]}, found {_describe(found)}{hint}"
    if kind == "literal_error":
        return f"{name}: expected {detail['ctx']['expected']}, found {_describe(found)}"
    if kind in ("too_short", "string_too_short"):
        return f"{name}: must not be empty"
    if kind == "value_error":
        return f"{name}: {_reason(detail['msg'])}"
    # Bounds: "Input should be greater than or equal to 1".
    return f"{name}: {detail['msg'].replace('Input should be', 'must be')}, found {_describe(found)}"


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")


def _describe(value: Any) -> str:
    """What a wrong value is, for a message; a token in it is masked."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'the text "{mask(value) if holds_token(value) else value}"'
    names: dict[type, str] = {list: "a list", dict: "a mapping"}
    return names.get(type(value), f"a {type(value).__name__}")


def _describe_node(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return _describe(node.value) if node.value not in ("", "null", "~") else _describe(None)
    return "a list"


def _type_name(annotation: Any) -> str:
    """A field's type in a reader's words: integer, number, text, true or false, list, mapping, or its choices."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}[annotation]
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return " or ".join(map(_type_name, arguments))  # X | None


# -------------------------------------------------------------------------------------------------------------- writing


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe, defaults included; `load_recipe(path)` gives an equal one."""
    path.write_text(_to_yaml({section: asdict(recipe)[section] for section in SECTIONS}), encoding="utf-8")


def _to_yaml(document: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = False  # escapes: some characters that YAML takes for line breaks would not come back
    yaml.width = 1_000_000
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()
