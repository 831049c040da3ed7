"""Read, check, override and write the settings of `config`: every key known, every value of its type and in bounds."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from trainer.config import Config
from trainer.faults import ConfigFault


class _Loader(yaml.SafeLoader):
    """YAML in which a key must not stand twice, and 1e-3 is a number as in YAML 1.2."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in made:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        made[key] = loader.construct_object(value_node, deep=True)
    return made


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """A YAML document, or the value of an option on the command line."""
    return _numbers(yaml.load(text, _Loader))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value[:1]:
        try:
            return float(value)  # YAML 1.1 wants 1.0e-3, and reads 1e-3 as text
        except ValueError:
            pass
    return value


def load(path: Path, overrides: Iterable[str] = (), loss_options: Iterable[str] = ()) -> Config:
    """The settings of a file, with ``key=value`` overrides such as ``optimizer.rate=0.4``.

    Raises:
        ConfigFault: the file cannot be read, a key is unknown, or a value does not fit; the message says which.
    """
    return override(_read(path, seen=()), overrides, loss_options, str(path))


def override(tree: dict[str, Any], overrides: Iterable[str], loss_options: Iterable[str], where: str) -> Config:
    """The settings of a plain tree with overrides; raises ConfigFault as `load` does."""
    tree = copy.deepcopy(tree)
    for text in overrides:
        _override(tree, text, "--set")
    for text in loss_options:
        _override(tree, f"loss.options.{text}", "--loss-option")
    return build(tree, where)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The tree of a file over that of the file which its key ``base`` names."""
    if path in seen:
        raise ConfigFault(f"{path} names itself as its base")
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigFault(f"cannot read the configuration {path}: {fault.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ConfigFault(f"{path} is not YAML: {' '.join(str(fault).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigFault(f"{path} must hold keys and values; got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigFault(f"{path}: base must be the name of a file beside it; got {base!r}")
    return merge(_read(path.parent / base, (*seen, path)), tree)


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section; `options` are replaced whole, as they belong to a name."""
    made = dict(below)
    for key, value in above.items():
        inner = made.get(key)
        made[key] = (
            merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) and key != "options" else value
        )
    return made


def _override(tree: dict[str, Any], text: str, flag: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigFault(f"{flag} takes key=value; got {text!r}")
    try:
        parsed = parse(value)
    except yaml.YAMLError:
        raise ConfigFault(f"{flag} {key}: {value!r} is not a YAML value") from None
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        inner = node.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = node[section] = {}
        node = inner
    node[last] = parsed


def build(tree: Mapping[str, Any], where: str) -> Config:
    """The checked settings of a plain tree."""
    made = _section(Config, tree, "", where)
    _check_together(made, where)
    return made


def _section(kind: type, tree: Any, prefix: str, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigFault(f"{where}: {prefix.rstrip('.')} must be a section of keys and values; got {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            known = ", ".join(fields)
            raise ConfigFault(f"{where}: unknown key {prefix}{key}; {hint}known{' here' if prefix else ''} are {known}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _section(hint, {} if value is None else value, f"{prefix}{key}.", where)
        else:
            values[key] = _value(hint, value, f"{where}: {prefix}{key}", fields[key].metadata)
    return kind(**values)


def _value(hint: Any, value: Any, name: str, bounds: Mapping[str, Any]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and type(None) in arguments:
        if value is None:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return _value(rest[0] if len(rest) == 1 else Union[tuple(rest)], value, name, bounds)  # noqa: UP007
    if origin is Literal:
        if isinstance(value, bool) or value not in arguments:
            raise ConfigFault(f"{name} must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin is list:
        values = value if isinstance(value, list) else [value]
        return [_value(arguments[0], inner, name, bounds) for inner in values]
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigFault(f"{name} must be a section of keys and values; got {value!r}")
        for key, inner in value.items():
            _plain(inner, f"{name}.{key}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigFault(f"{name} must be {_type_name(hint)}; got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigFault(f"{name} must be finite; got {value!r}")
    for bound, right, words in (
        ("least", lambda limit: value >= limit, "at least"),
        ("most", lambda limit: value <= limit, "at most"),
        ("above", lambda limit: value > limit, "more than"),
    ):
        limit = bounds.get(bound)
        if limit is not None and not right(limit):
            raise ConfigFault(f"{name} must be {words} {limit:g}; got {value!r}")
    return value


def _plain(value: Any, name: str) -> None:
    if isinstance(value, list):
        for inner in value:
            _plain(inner, name)
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise ConfigFault(f"{name} must be a number, a text, true, false, or a list of these; got {value!r}")


def _type_name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _check_together(config: Config, where: str) -> None:
    """Settings that fit one by one and not together."""
    augment, data, teacher = config.augment, config.data, config.teacher

    def refuse(message: str) -> typing.NoReturn:
        raise ConfigFault(f"{where}: {message}")

    if not config.student.name:
        refuse("student.name is missing")
    if config.loss.name != "ce" and not teacher.name:
        refuse(f"teacher.name is missing, and loss.name={config.loss.name} needs a teacher; ce does without")
    if data.source in ("folder", "webdataset", "cifar100") and not data.root:
        refuse(f"data.root is missing, and data.source={data.source} reads files")
    if data.source in ("webdataset", "synthetic") and data.classes is None:
        refuse(f"data.classes is missing; data.source={data.source} cannot know it")
    for name in ("scale", "ratio"):
        low_high = getattr(augment, name)
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            refuse(f"augment.{name} must be two numbers, 0 < low <= high; got {low_high}")
    for name in ("mean", "std"):
        if len(getattr(augment, name)) not in (1, data.channels):
            or_each = f", or {data.channels}" if data.channels > 1 else ""
            refuse(
                f"augment.{name} must have one number{or_each} for data.channels={data.channels}; "
                f"got {len(getattr(augment, name))}"
            )
    if not all(value > 0 for value in augment.std):
        refuse(f"augment.std must be more than 0; got {augment.std}")
    if teacher.cache:
        if augment.mixup or augment.cutmix:
            refuse("teacher.cache keeps logits by image, and mixup and cutmix make new images: turn either off")
        if augment.enabled and not augment.period and data.source != "synthetic":
            refuse(
                "teacher.cache needs images that come again: augment.period=N repeats the crops every N epochs, "
                "augment.enabled=false has none"
            )
    if config.precision.dtype == "float64" and config.precision.amp != "none":
        refuse("precision.dtype=float64 leaves nothing to precision.amp: set one of them")
    if config.accumulate > config.batch:
        refuse(f"accumulate={config.accumulate} micro-batches are more than batch={config.batch} images")


def tree(config: Any) -> dict[str, Any]:
    """The settings as a plain tree, which `build` reads back."""
    return dataclasses.asdict(config)


def text(config: Config) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(tree(config), sort_keys=False, allow_unicode=True)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) of every setting that two trees do not share."""
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def reference() -> str:
    """A Markdown table of every key: default, meaning, bounds. docs/training.md holds it."""
    return "\n".join(_reference_rows(Config, ""))


def _reference_rows(kind: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    title = prefix.rstrip(".") or "the run"
    yield f"**{title}**: {(kind.__doc__ or '').splitlines()[0]}"
    yield ""
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    sections = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            sections.append(field.name)
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[operator, misc]
        limits = _limits(hints[field.name], field.metadata)
        yield f"| `{prefix}{field.name}` | {_shown(default)} | {field.metadata['doc']}{limits} |"
    yield ""
    for name in sections:
        yield from _reference_rows(hints[name], f"{prefix}{name}.")


def _shown(default: Any) -> str:
    if default is None or default == "" or default == {}:
        return "–"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    if isinstance(default, list):
        return "`[" + ", ".join(f"{value:g}" for value in default) + "]`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _limits(hint: Any, bounds: Mapping[str, Any]) -> str:
    if get_origin(hint) is Literal:
        return " (" + ", ".join(f"`{value}`" for value in get_args(hint)) + ")"
    words: Sequence[str] = [
        f"{sign} {bounds[name]:g}"
        for name, sign in (("least", ">="), ("above", ">"), ("most", "<="))
        if bounds[name] is not None and bounds[name] < 2**31 - 1
    ]
    return f" ({', '.join(words)})" if words else ""
