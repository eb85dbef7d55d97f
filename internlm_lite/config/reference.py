"""The reference of all config keys, from the schema's docstrings.

python -m internlm_lite.config.reference > docs/config.md
"""

from __future__ import annotations

import inspect
import re
import signal
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from internlm_lite.config.foreign import FEATURES, NO_EFFECT, NO_EFFECT_IF
from internlm_lite.config.keys import expected, field_of, item_of, section_of
from internlm_lite.config.schema import Config, Section

_HEAD = """\
# Config files

[简体中文](config.zh.md)

Written by `python -m internlm_lite.config.reference > docs/config.md`; a test keeps it up to date.

A config file is Python. UPPER_CASE names are your own variables, lower-case dicts are sections, modules, functions and
names with a leading `_` are ignored. Any wrong key, type, range or combination is refused at the start, all at once.

- `NAME=value` on the command line replaces the assignment of a variable **before** the file runs, so what is derived
  from it follows. `section.key=value` sets one key afterwards.
- `_base_ = "other.py"` (or a list, later ones first in rank) loads other files below this one. Dicts merge key by key;
  `_delete_=True` in a dict replaces the one below. An UPPER_CASE variable of a file replaces that of its bases before
  they run.
- `train.py --print-config {full,diff,origin}` shows what all this comes to, and where each value was written;
  `schedule` shows learning rate, momenta and batch size over the run.
- `skip_batches` is `"1-3,7"`: batch ids from 0, ends included. `rampup_batch_size` is `"start increment every"`,
  in steps, or `"start increment every tokens"`.
- Later spellings are understood, each with a note: `ckpt.load_ckpt_info`, `parallel.zero1=dict(size=...)`,
  `parallel.tensor=dict(size=..., mode=...)`, `parallel.pipeline=2`, `parallel.context=2`, `model_type`, top-level
  `use_fp32_norm`.
"""
_LEFT_OUT = re.compile(r"left out: (\S+)\.$", re.IGNORECASE)


def reference() -> str:
    """The whole document as Markdown."""
    return "\n".join([_HEAD, *_section("", Config), *_foreign()])


def _foreign() -> Iterator[str]:
    yield "## Keys of InternLM and InternEvo that change nothing here\n"
    yield "They are dropped, and named by one note at the start.\n\n| key | why |\n|---|---|"
    yield from (f"| `{key}` | {why} |" for key, why in sorted(NO_EFFECT.items()))
    yield "\n## Keys of which one value is understood\n\n| key | value | because |\n|---|---|---|"
    for key, (values, why) in sorted(NO_EFFECT_IF.items()):
        yield f"| `{key}` | {' or '.join(f'`{value!r}`' for value in values)} | {why} |"
    yield "\n## Features that are not supported\n\n| feature | nearest |\n|---|---|"
    yield from (f"| {what} | {nearest} |" for what, nearest in FEATURES.values())
    yield ""


def _section(prefix: str, section: type[Section]) -> Iterator[str]:
    fields = section.model_fields
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    title = title.replace("[i]`", "`, a list of dicts")
    plain = {name: field for name, field in fields.items() if section_of(field) is None}
    yield f"## {title}\n\n{inspect.getdoc(section)}\n\n| key | value | default | meaning |\n|---|---|---|---|"
    for name, field in plain.items():
        cells = (f"`{prefix}{name}`", expected(field), _default(field), field.description or "")
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for name in fields:
        key = prefix + name
        found = field_of(key)
        if found is not None and (inner := section_of(found)):
            yield from _section(f"{key}.", inner)
        elif found is not None and (inner := item_of(found)):
            yield from _section(f"{key}[i].", inner)


def _default(field: FieldInfo) -> str:
    """The default as text, or the key it is taken from: descriptions end with "left out: THAT KEY."."""
    taken = _LEFT_OUT.search(field.description or "")
    if taken:
        return f"`{taken[1]}`"
    return "required" if field.is_required() else f"`{field.get_default()!r}`"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`
    print(reference(), end="")
