"""The example configs and launch scripts: at the top level of a checkout, in internlm_lite/starter once installed."""

from __future__ import annotations

from pathlib import Path

import internlm_lite

_PACKAGE = Path(internlm_lite.__file__).parent
_PACKED = _PACKAGE / "starter"


def checkout() -> Path | None:
    """The root of the checkout that this package is part of; None where it was installed from a wheel."""
    return None if _PACKED.is_dir() else _PACKAGE.parent


def starter_folder() -> Path:
    """Holds configs/, launch/ and train.py."""
    return checkout() or _PACKED


def working_folder() -> Path:
    """Where launch/ and train.py are looked for, and files go by default: the checkout, else the current folder."""
    return checkout() or Path.cwd()
