"""JSON objects as dataclasses: the fields are the schema, read with every type checked and written as they are."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from ropelab.files import is_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """The base of what is kept as a JSON object.

    A field without a default has to be there. `SPARSE` fields are not written where they are None or empty; the others
    always are. extra: what other versions wrote, which is kept. True and False are no numbers, and neither is what is
    not finite or needs more than 64 bits.
    """

    SPARSE: ClassVar[frozenset[str]] = frozenset()

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, item: Any, where: str = "") -> Self:
        """From parsed JSON. `ValueError` says which field, named with `where` before it, is not as it has to be."""
        if not isinstance(item, Mapping):
            raise ValueError(f"{where.rstrip('.') or 'it'} is no JSON object")
        values: dict[str, Any] = {}
        kinds = _kinds(typing.cast(type, cls))
        for field in dataclasses.fields(cls):
            if field.name == "extra":
                continue
            if field.name in item:
                values[field.name] = _read(item[field.name], kinds[field.name], f"{where}{field.name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}{field.name} is missing")
        known = kinds.keys()
        return cls(**values, extra={key: value for key, value in item.items() if key not in known})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` is the inverse."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "extra"]
        shown = {name: _plain(getattr(self, name)) for name in fields}
        return {
            **{key: value for key, value in shown.items() if key not in self.SPARSE or value not in (None, [], {})},
            **self.extra,
        }


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return {name: kind for name, kind in typing.get_type_hints(cls).items() if name not in ("extra", "SPARSE")}


def _read(value: Any, kind: Any, where: str) -> Any:
    """A JSON value as a field's type says. `ValueError` where it is not of it."""
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if value is None and types.NoneType in options:
            return None
        return _read_one(value, [option for option in options if option is not types.NoneType], where)
    return _read_one(value, [kind], where)


def _read_one(value: Any, options: Sequence[Any], where: str) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where} is a number of {len(str(abs(value)))} digits")
    for kind in options:
        origin = typing.get_origin(kind)
        if isinstance(kind, type) and issubclass(kind, Stored):
            return kind.from_json(value, f"{where}.")
        if origin in (list, tuple) and isinstance(value, list | tuple):
            (of, *rest) = typing.get_args(kind)
            if origin is tuple and Ellipsis not in rest and len(value) != 1 + len(rest):
                raise ValueError(f"{where} has {len(value)} entries, not {1 + len(rest)}")
            return origin(_read(each, of, f"{where}[{number}]") for number, each in enumerate(value))
        if kind is float and is_of(value, (int, float)):
            return value
        plain = dict if origin in (dict, Mapping) or kind is Mapping else kind
        if isinstance(plain, type) and origin not in (list, tuple) and is_of(value, (plain,)):
            return value
    raise ValueError(f"{where} is {type(value).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value
