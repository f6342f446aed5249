"""The text of a run configuration: YAML, overrides of the form `section.key=value`, and what is wrong with them.

`pipeline.config` says which settings there are.
"""

import difflib
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError

from common.console import UsageError
from common.paths import check_regular

# What pydantic says in words of Python, in words of a YAML file.
RULES = {
    "path_type": "must be the path of a file or folder",
    "string_type": "must be one text",
    "too_short": "must name at least one",
    "tuple_type": "must be a list, such as [1, 2]",
    "int_parsing": "must be a whole number, such as 8",
    "int_type": "must be a whole number, such as 8",
    "int_from_float": "must be a whole number, such as 8",
    "float_parsing": "must be a number, such as 2e-5",
    "float_type": "must be a number, such as 2e-5",
    "finite_number": "must be a finite number, such as 2e-5",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "byte_size": "must be a number of bytes, such as 200GB",
    "byte_size_unit": "must be a number of bytes, such as 200GB",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


MAX_BYTES = 1 << 16  # of a file; those in configs/ have 2,000
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What the loader raises about a text: tags such as `!!int` end in errors of Python's own."""


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar but null as the text it is; the settings' types say what it means.

    YAML itself would make numbers of `run_dir: 20241107` and dates of `2024-11-07`. Anchors and aliases are refused: a
    few lines of them say billions of values.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if rule[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Returns the next node.

        Raises:
            ComposerError: It has an anchor, or is an alias.
        """
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            problem = "anchors (&) and aliases (*) are not taken; write the values out"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def nearest(name: str, known: Any) -> str:
    """Returns " (did you mean 'x'?)" for the known name closest to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the content of a YAML file, every scalar but null as text.

    Raises:
        UsageError: It cannot be read, or holds something else than settings.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name an existing YAML file, such as one of configs/") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: more than {MAX_BYTES:,} bytes, which no configuration has")
    try:
        values = yaml.load(data.decode(), _TextLoader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as that") from None
    except YAML_ERRORS as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold `key: value` lines, found {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts what `section.key=value` says into `values`.

    Raises:
        UsageError: It does not have this form.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UsageError(
            f"override {override!r} must look like section.key=value, for example optim.learning_rate=2e-5"
        )
    *sections, key = path.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UsageError(f"override {override!r}: {section!r} is a single value, it has no {key!r} inside")
    try:
        target[key] = yaml.load(text, _TextLoader)
    except YAML_ERRORS:
        target[key] = text


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Returns in one line what is wrong with a configuration whose schema is `root`."""
    items = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]
    return "; ".join(_explain(item, root) for item in items)


def _explain(item: Any, root: type[BaseModel]) -> str:
    """Returns one pydantic error in the house style."""
    location, kind, given = item["loc"], item["type"], item["input"]
    path = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        fields = _fields_at(root, location[:-1])
        return f"unknown setting {path}{nearest(str(location[-1]), fields)}; known here: {', '.join(fields)}"
    if kind == "missing" or given is None:
        return f"{path} is required and missing; set it in the file or as {path}=..."
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if fields := _fields_at(root, location):
        return (
            f"{path} is a section, not {_shown(given)}; set {path}.{fields[0]}=... and so on, or name its file in YAML"
        )
    if isinstance(given, dict):
        return f"{path} is a single setting, it has no {', '.join(map(str, given)) or 'section'} inside"
    rule = RULES[kind].format(**item.get("ctx", {})) if kind in RULES else item["msg"].lower()
    return f"{path}={_shown(given)}: {rule}"


def _shown(given: Any) -> str:
    return given if isinstance(given, str) else repr(given)


def _fields_at(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Returns the settings of the section at a place of the configuration; none where there is no section."""
    kind: Any = root
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = None if field is None else field.annotation
        else:  # a number in a list
            kind = next(iter(get_args(kind)), None)
        if isinstance(kind, UnionType):
            kind = get_args(kind)[0]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
