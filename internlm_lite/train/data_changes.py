"""How the data of a checkpoint differs from that of this run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_FILES = 5


def data_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key and each data folder that differs between two fingerprints of `data.loader`."""
    keys = [key for key in sorted(stored.keys() | now.keys()) if key != "folders" and stored.get(key) != now.get(key)]
    lines = [f"{key}: {stored.get(key)!r} then, {now.get(key)!r} now" for key in keys]
    old, new = ({folder["name"]: folder for folder in one.get("folders", [])} for one in (stored, now))
    lines += [f"data folder {name}: gone" for name in old if name not in new]
    lines += [f"data folder {name}: new" for name in new if name not in old]
    lines += [_folder(name, old[name], new[name]) for name in old if name in new and old[name] != new[name]]
    if not lines and stored != now:
        lines = [f"data folders: {', '.join(old)} then, {', '.join(new)} now"]
    return lines


def _folder(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = ({file["name"]: file for file in one["files"]} for one in (old, new))
    groups = {
        "gone": [file for file in before if file not in after],
        "new": [file for file in after if file not in before],
        "changed": [file for file in before if file in after and before[file] != after[file]],
    }
    told = [f"{what}: {_listed(files)}" for what, files in groups.items() if files]
    amounts = [f"{one['documents']} documents of {one['tokens']} tokens" for one in (old, new)]
    if amounts[0] != amounts[1]:
        told.append(f"{amounts[0]} then, {amounts[1]} now")
    return f"data folder {name}: {'; '.join(told) or 'its files are in another order'}"


def _listed(files: list[str]) -> str:
    more = f" and {len(files) - _MOST_FILES} more" if len(files) > _MOST_FILES else ""
    return ", ".join(files[:_MOST_FILES]) + more
