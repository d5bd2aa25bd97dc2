"""Random JSON schemas of the kinds that public suites have, as JSONSchemaBench: of functions, Kubernetes, GitHub."""

from __future__ import annotations

import random
from typing import Any

_PATTERNS = ["^[a-z]{2,6}$", "^[A-Z]{3}-[0-9]{2,4}$", "^(on|off)$", "^#[0-9a-f]{6}$", "^[a-z]+(\\.[a-z]+)*$", "[0-9]"]
_FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname"]
_NAMES = ["id", "name", "kind", "size", "tags", "spec", "items", "value", "näme", "a b", "$x", "x-y"]


def random_schema(random_: random.Random) -> dict[str, Any]:
    """A schema that some value fits; a third has definitions that others refer to, recursive ones among them."""
    return _Schemas(random_).schema()


class _Schemas:
    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self._definitions: dict[str, Any] = {}

    def schema(self) -> dict[str, Any]:
        if self._random.random() < 0.33:
            self._definitions["leaf"] = self._any(depth=1)
            self._definitions["node"] = {
                "type": "object",
                "properties": {"leaf": {"$ref": "#/$defs/leaf"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["leaf"],
                "additionalProperties": False,
            }
        root = self._any(depth=3) if self._random.random() < 0.2 else self._object(depth=3)
        return {**root, "$defs": self._definitions} if self._definitions else root

    def _any(self, depth: int) -> dict[str, Any]:
        flat = [self._string, self._integer, self._number, self._enum, self._const, self._simple]
        if self._definitions.get("node") and self._random.random() < 0.2:
            return {"$ref": f"#/$defs/{self._random.choice(['leaf', 'node'])}"}
        if depth and self._random.random() < 0.4:
            return self._random.choice([self._object, self._array, self._tuple, self._any_of, self._all_of])(depth)
        return {**self._random.choice(flat)(), **self._random.choice([{}, {}, {"description": "Some text."}])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(_NAMES, self._random.randint(0, 5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": [name for name in names if self._random.random() < 0.7],
            "additionalProperties": False,
        }
        match self._random.randrange(6):
            case 0:
                schema["additionalProperties"] = self._any(0)
            case 1:
                schema["patternProperties"] = {"^_[a-z]{1,3}$": self._any(0)}
            case 2:
                schema["properties"] = {**schema["properties"], "one": {"type": "null"}, "two": {"type": "null"}}
                schema["minProperties"] = len(schema["required"]) + 1
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randint(0, 2)
        bounds = {"minItems": least, "maxItems": least + self._random.randint(0, 2)}
        return {"type": "array", "items": self._any(depth - 1), **bounds}

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _all_of(self, depth: int) -> dict[str, Any]:
        first, second = ({"type": "object", "properties": {name: self._any(0)}, "required": [name]} for name in "pq")
        return {"allOf": [first, second]}

    def _string(self) -> dict[str, Any]:
        match self._random.randrange(4):
            case 0:
                return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
            case 1:
                return {"type": "string", "format": self._random.choice(_FORMATS)}
            case 2:
                least = self._random.randint(0, 4)
                return {"type": "string", "minLength": least, "maxLength": least + self._random.randint(0, 8)}
            case _:
                return {
                    "type": "string",
                    "pattern": "^[a-z]+$",
                    "minLength": 2,
                    "maxLength": self._random.randint(2, 9),
                }

    def _integer(self) -> dict[str, Any]:
        least = self._random.randint(-(10**4), 10**4)
        most = least + self._random.choice([0, 3, 90, 10**6])
        return self._random.choice(
            [
                {"type": "integer"},
                {"type": "integer", "minimum": least, "maximum": most},
                {"type": "integer", "exclusiveMinimum": least},
                {"type": "integer", "multipleOf": self._random.choice([2, 5, 7, 10])},
            ]
        )

    def _number(self) -> dict[str, Any]:
        least = round(self._random.uniform(-100, 100), 2)
        bounds = {"minimum": least, "maximum": least + self._random.choice([0.5, 1, 1000])}
        return self._random.choice(
            [{"type": "number"}, {"type": "number", **bounds}, {"type": "number", "exclusiveMaximum": least}]
        )

    def _enum(self) -> dict[str, Any]:
        values = [None, True, 1, -2.5, "a", "two words", 'quo"te\\', "猫", "", [1, "x"], {"k": 0}]
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _const(self) -> dict[str, Any]:
        return {"const": self._random.choice(["fixed", 3, False, None, {"a": ["b"]}, "é\n"])}

    def _simple(self) -> dict[str, Any]:
        kinds = ["string", "boolean", "null", "integer"]
        return {"type": self._random.choice([*kinds, self._random.sample(kinds, 2)])}
