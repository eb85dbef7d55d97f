"""Reads again what looks damaged: networks, caches and memory flip bits on the way from a storage that is right."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from internlm_lite.errors import DamagedError

logger = logging.getLogger("internlm_lite")
P = ParamSpec("P")
T = TypeVar("T")


def read_twice(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, called a second time if it raises DamagedError; warns if the second reading is right."""

    @wraps(read)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return read(*arguments, **named)
        except DamagedError as error:
            first = str(error)
        found = read(*arguments, **named)
        logger.warning("%s; a second reading is right and is used: network or memory change what is read", first)
        return found

    return call
