"""The example configs and launch scripts: at the top level of a checkout, in internlm_lite/starter once installed."""

from __future__ import annotations

from pathlib import Path

import internlm_lite

_PACKAGE = Path(internlm_lite.__file__).parent
_PACKED = _PACKAGE / "starter"


def checkout() -> Path | None:
    """Root of the checkout that contains this package; None if it was installed from a wheel."""
    return None if _PACKED.is_dir() else _PACKAGE.parent


def starter_folder() -> Path:
    """The folder with configs/, launch/ and train.py."""
    return checkout() or _PACKED


def working_folder() -> Path:
    """Default folder of launch/, train.py and output files: the checkout, else the current folder."""
    return checkout() or Path.cwd()
