"""Pickles from outside. Python's own reader calls whatever they name; this one knows only what a file needs."""

import pickle
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, BinaryIO, ClassVar

type Globals = Mapping[tuple[str, str], Any]
"""What a pickle may name, by module and name, and what stands for it."""


UNKNOWN_NAME = re.compile(r"GLOBAL ([\w.]+)")
_Unpickler: Any = vars(pickle)["_Unpickler"]  # the one in Python: that in C has no `dispatch`


class DataUnpickler(_Unpickler):
    """Builds plain containers, numbers, texts, and objects of the classes it is given."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    stack: list[Any]

    def __init__(self, stream: BinaryIO, known: Globals) -> None:
        super().__init__(stream)
        self.known = known

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a pickle names.

        Raises:
            UnpicklingError: It is not one of `known`.
        """
        try:
            return self.known[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file has no use for") from None

    def load_build(self) -> None:
        """Sets the attributes of an object, never those of a class or of an enum's member, which others share."""
        if isinstance(changed := self.stack[-2], type | Enum):
            raise pickle.UnpicklingError(f"it changes {changed!r}, which is shared")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_pickle(stream: BinaryIO, known: Globals) -> Any:
    """Returns what a pickle holds, in which nothing may be named but what is `known`.

    Raises:
        ValueError: It names something else, or is damaged.
    """
    try:
        return DataUnpickler(stream, known).load()
    except Exception as error:  # a crafted one may call what is known with any arguments
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def tell(error: BaseException) -> str:
    """Returns what is wrong in one line; of what torch refuses to call, its name and not torch's advice to call it."""
    if isinstance(error, pickle.UnpicklingError) and (unknown := UNKNOWN_NAME.search(str(error))):
        return f"it names {unknown[1]}, which such a file has no use for"
    return " ".join(str(error).split())[:300] or type(error).__name__
