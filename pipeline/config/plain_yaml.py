"""YAML for settings: plain mappings, lists and scalars, of a size that a person writes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000
"""Values of a document once its aliases are written out."""
MAX_DEPTH = 40


class _Loader(yaml.SafeLoader):
    """Refuses keys that occur twice or are no words; dates stay text, as no setting is one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in seen and key.tag == _TEXT:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value[:80]}' occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """Takes every scalar as the text it is written with."""


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in some if tag != "tag:yaml.org,2002:timestamp"]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.yaml_implicit_resolvers = {}


def parse_yaml(text: str, *, all_text: bool = False) -> Any:
    """The value a document stands for; with `all_text` every scalar is text.

    Raises yaml.YAMLError (or ValueError, RecursionError, as YAML's own parser does) for what is no YAML, has a tag, a
    key twice, nesting or aliases without end, or more text than settings have.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters; settings have at most {MAX_CHARACTERS}")
    loader = (_TextLoader if all_text else _Loader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}, set()) > MAX_VALUES:
            raise yaml.YAMLError(f"stands for more than {MAX_VALUES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def line_of(text: str, path: Sequence[str]) -> int | None:
    """The line, from 1, in which a document writes the key at a path of keys; None where it has no such key (or has it
    by a merge). The document is one that `parse_yaml` reads.
    """
    loader = _Loader(text)
    try:
        node, line = loader.get_single_node(), None
        for part in path:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = [(key, value) for key, value in pairs if key.value == part]
            if not found:
                return None
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        return line
    finally:
        loader.dispose()


def _written_out(node: Any, counted: dict[int, int], above: set[int]) -> int:
    """Values below a node, with those that aliases repeat."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in counted:
        return counted[id(node)]
    if id(node) in above:
        raise yaml.YAMLError("an alias stands for what it is part of")
    if len(above) >= MAX_DEPTH:
        raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
    below = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    counted[id(node)] = 1 + sum(_written_out(part, counted, above | {id(node)}) for part in below)
    return counted[id(node)]
