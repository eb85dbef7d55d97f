"""Look at, verify, remove and average checkpoints in a save folder, local or on S3.

internlm-lite ckpt ls ckpts                   step, kind, size, age, layout, state; --deep reads every byte
internlm-lite ckpt verify ckpts               every check sum of every checkpoint; exit code 2 if one is damaged
internlm-lite ckpt prune ckpts --keep 3       remove what is older than the newest 3 good ones, except the best
internlm-lite ckpt merge OUT A B C            their average as a checkpoint of weights alone; --weights 1,2,3
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast, get_args

from rich.table import Table

from internlm_lite.checkpoint.admin.listing import Listed, list_checkpoints, unfinished
from internlm_lite.checkpoint.admin.merge import MergeSource, Method, weights_of
from internlm_lite.checkpoint.admin.merge import merge as merge_sources
from internlm_lite.checkpoint.admin.prune import plan_prune
from internlm_lite.checkpoint.admin.verify import Damage, damages_in, damages_of
from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.format.weight_roles import Weights, with_weights
from internlm_lite.checkpoint.load.locate import locate, open_at
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.checkpoint.storage.run_lock import LEASE_SECONDS, held, holder
from internlm_lite.cli.options import check_at_least, new_parser, s3_settings
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, ConfigError
from internlm_lite.runtime.dist_env import adopt_s3_keys
from internlm_lite.runtime.tool import ToolConsole, add_s3_option, run_tool
from internlm_lite.units import escaped, human_bytes, human_seconds

_PIPE_COLUMNS = 1000
"""Width of tables if standard output is no terminal, so that lines are not wrapped."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("ckpt", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="list checkpoints")
    ls.add_argument("folder", help="save folder")
    ls.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    ls.add_argument("--deep", action="store_true", help="read every byte (default: hashes, sizes, headers)")
    verify = commands.add_parser("verify", help="compare every check sum")
    verify.add_argument("folder", help="save folder, or one checkpoint of it")
    prune = commands.add_parser("prune", help="remove old checkpoints")
    prune.add_argument("folder", help="save folder")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="good checkpoints to keep")
    prune.add_argument("--dry-run", action="store_true", help="show what would be removed")
    merge = commands.add_parser("merge", help="average checkpoints of one model, saved in any layouts")
    merge.add_argument("out", help="save folder without checkpoints, local or on S3")
    text = "save folder (its newest), FOLDER/STEP, or one checkpoint; one may be given twice"
    merge.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=text)
    text = "mean: equal weights; linear: 1, 2, 3, ... in the order given (mean)"
    merge.add_argument("--method", choices=get_args(Method), default="mean", help=text)
    text = (
        "weights of your own, such as 1,2,3, which are divided by their sum; or ema: average the averaged weights of "
    )
    text += "the checkpoints (may be given twice, once for each)"
    merge.add_argument("--weights", action="append", default=[], metavar="LIST", help=text)
    for command in (ls, verify, prune, merge):
        add_s3_option(command)
    arguments = parser.parse_args(argv)
    check_at_least(parser, arguments, keep=1)
    return arguments


def stores(where: str, s3: S3Config) -> list[Storage]:
    """The save folder, and save folders inside it. Raises CheckpointError when none has a checkpoint."""
    storage = open_storage(where, s3)
    folders = catalog.folders_in(storage.list(""))
    if not folders:
        raise CheckpointError(f"{storage.name} holds no checkpoint; expected a save folder, or one checkpoint of it")
    return [open_storage(f"{where.rstrip('/')}/{folder}", s3) if folder else storage for folder in folders]


def ls(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code."""
    listed = [
        (storage, list(list_checkpoints(storage, deep=arguments.deep))) for storage in stores(arguments.folder, s3)
    ]
    if arguments.json:
        print(json.dumps([_as_json(storage, found, arguments.deep) for storage, found in listed], indent=2))
        return 0
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    console = ToolConsole(width=None if on_terminal else _PIPE_COLUMNS)
    for storage, found in listed:
        looked = "every byte read" if arguments.deep else "hashes, sizes, headers; --deep reads every byte"
        print(escaped(f"{storage.name}  ({looked})"), flush=True)
        console.print(_table(found))
        for checkpoint in found:
            for problem in checkpoint.problems:
                print(f"{checkpoint.name}: {problem}")
        left = unfinished(storage)
        if left:
            size = human_bytes(sum(save.n_bytes for save in left))
            print(f"unfinished saves: {len(left)}, {size}: under way, or swept by the next run that saves here")
    return 0


def _table(found: Sequence[Listed]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("step", "size", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("kind", "layout", "state"):
        table.add_column(column)
    table.add_column("name", no_wrap=True)
    for one in found:
        axes = [f"{axis}={size}" for axis, size in one.layout.items() if size > 1 and axis != "world"]
        world = one.layout.get("world", 0)
        layout = " ".join([f"{world or '?'} rank{'' if world == 1 else 's'}", *axes])
        state = "[red]damaged[/]" if one.problems else "good"
        age = human_seconds(max(0.0, time.time() - one.modified))
        kind = (one.kind or "?") + ("" if one.valid_loss is None else f" (loss {one.valid_loss:.4f})")
        table.add_row(str(one.name.step), human_bytes(one.n_bytes), age, kind, layout, state, str(one.name))
    return table


def _as_json(storage: Storage, found: Sequence[Listed], deep: bool) -> dict[str, Any]:
    now = time.time()
    checkpoints = [
        {
            "name": str(one.name),
            "step": one.name.step,
            "kind": one.kind,
            **({} if one.valid_loss is None else {"valid_loss": one.valid_loss}),
            "bytes": one.n_bytes,
            "age_seconds": round(now - one.modified, 1),
            "layout": one.layout,
            "verified": "every byte" if deep else "documents, sizes, headers",
            "good": not one.problems,
            "problems": list(one.problems),
        }
        for one in found
    ]
    left = [
        {"name": str(save.name), "bytes": save.n_bytes, "age_seconds": round(now - save.modified, 1)}
        for save in unfinished(storage)
    ]
    return {"folder": storage.name, "checkpoints": checkpoints, "unfinished": left}


def verify(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code: 2 when something is damaged."""
    root, name = locate(arguments.folder, s3)
    if name is not None:
        storage = open_storage(root, s3)
        return 0 if _show(str(name), damages_of(storage, name), partial(_is_gone, storage, name)) else 2
    storage = open_storage(arguments.folder, s3)
    if storage.size("manifest.json") is not None:  # a copy of one checkpoint's folder
        found = open_at(storage, None)
        return 0 if _show(found.name, damages_in(found)) else 2
    results = [
        _show(f"{storage.name}  {name}", damages_of(storage, name), partial(_is_gone, storage, name))
        for storage in stores(arguments.folder, s3)
        for name in catalog.committed(storage)
    ]
    return 0 if all(results) else 2


def _is_gone(storage: Storage, name: Name) -> bool:
    return storage.size(name.commit) is None


def _show(title: str, damages: Iterable[Damage], is_gone: Callable[[], bool] = lambda: False) -> bool:
    """Print damages as they are found; True if there are none. `is_gone` is called only if there are some."""
    begin, found = time.monotonic(), iter(damages)
    first = next(found, None)
    if first is None:
        print(f"{title}: good, every byte ({human_seconds(time.monotonic() - begin)})", flush=True)
        return True
    if is_gone():
        print(f"{title}: removed meanwhile", flush=True)
        return True
    print(f"{title}: DAMAGED")
    for damage in chain([first], found):
        print(f"  {damage}", flush=True)
    return False


def prune(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code. Refuses, with StorageError, while a run uses the folder."""
    storage = open_storage(arguments.folder, s3)
    inside = [folder for folder in catalog.folders_in(storage.list("")) if folder]
    if not catalog.committed(storage):  # do not create a lock in a folder that is not a save folder
        hint = "".join(f"; {storage.name}/{folder} is one" for folder in inside)
        raise CheckpointError(f"{storage.name} holds no checkpoint; expected a save folder{hint}")
    for folder in inside:
        print(escaped(f"left alone: {storage.name}/{folder}, a save folder of its own"))
    if arguments.dry_run:
        return _prune(storage, arguments.keep, dry_run=True)
    if holder(storage) is not None:
        print(f"{storage.name} is locked: looking whether its run is alive, for up to {LEASE_SECONDS:g} s", flush=True)
    with held(storage):
        return _prune(storage, arguments.keep, dry_run=False)


def _prune(storage: Storage, keep: int, dry_run: bool) -> int:
    plan = plan_prune(storage, keep)
    if not plan.kept:
        raise CheckpointError(f"{storage.name} holds no good checkpoint: nothing was removed")
    for name in plan.kept:
        print(f"keep    {name}")
    for name in plan.damaged:
        print(f"keep    {name}  (damaged: look at it with verify)")
    for name in plan.removed:
        print(f"{'would remove' if dry_run else 'remove'}  {name}", flush=True)
        if not dry_run:
            catalog.remove(storage, name)
    if not plan.removed:
        print("nothing to remove")
    return 0


def merge(arguments: argparse.Namespace, s3: S3Config) -> int:
    """Exit code."""
    which, given = _which_weights(arguments.weights)
    _require_no_checkpoint(arguments.out, s3)
    weights = weights_of(len(arguments.checkpoints), arguments.method, given)
    opened = [_opened(path, which, s3) for path in arguments.checkpoints]
    sources = [MergeSource(found, weight) for found, weight in zip(opened, weights, strict=True)]
    facts = {"method": arguments.method if given is None else "weights", "of": which}
    begin = time.monotonic()
    name, n_tensors, n_bytes = merge_sources(open_storage(arguments.out, s3), sources, facts)
    for source in sources:
        print(escaped(f"{source.weight / sum(weights):10.6f}  {source.found.name}  {source.found.storage.name}"))
    took = human_seconds(time.monotonic() - begin)
    print(escaped(f"{arguments.out}: checkpoint {name}, {n_tensors} tensors, {human_bytes(n_bytes)}, {took}"))
    print(escaped(f"to train on from it: ckpt.load_model_only_folder={arguments.out!r}"))
    return 0


def _require_no_checkpoint(out: str, s3: S3Config) -> None:
    """Raises ConfigError if OUT names a checkpoint: a folder made there would be read in its place from then on."""
    try:
        _, name = locate(out, s3)
    except CheckpointError:  # FOLDER/STEP without such a step
        return
    if name is not None:
        raise ConfigError(
            f"merge {out}: found checkpoint {name} there, expected a folder without checkpoints to write to, named "
            "before the checkpoints that are averaged"
        )


def _which_weights(texts: Sequence[str]) -> tuple[Weights, list[float] | None]:
    """(weights of each checkpoint that are averaged, numbers if some are given). Raises ConfigError."""
    which: Weights = "model"
    given = None
    for text in texts:
        if text in get_args(Weights):
            which = cast(Weights, text)
            continue
        if given is not None:
            raise ConfigError(f"--weights {text}: found numbers twice, expected them once; leave one of them out")
        try:
            given = [float(number) for number in text.split(",")]
        except ValueError:
            raise ConfigError(
                f"--weights {text!r}: expected numbers separated by commas, such as 1,2,3, or one of "
                f"{', '.join(get_args(Weights))}"
            ) from None
    return which, given


def _opened(path: str, which: Weights, s3: S3Config) -> Found:
    root, name = locate(path, s3)
    found = open_at(open_storage(root, s3), name)
    for reason in found.rejected:
        print(escaped(f"passed over {reason}"))
    return with_weights(found, which)


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    adopt_s3_keys(os.environ)
    commands = {"ls": ls, "verify": verify, "prune": prune, "merge": merge}
    return commands[arguments.command](arguments, s3_settings(arguments.s3))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 damaged or bad input, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments), has_s3_option=True)
