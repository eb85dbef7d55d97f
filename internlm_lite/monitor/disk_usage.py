"""Which local folders a run writes to, and the free space there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from internlm_lite.config.paths import is_s3, normalize_path
from internlm_lite.config.schema import CkptConfig
from internlm_lite.monitor.alerts import DiskFigures


def written_folders(run_folder: Path, ckpt: CkptConfig) -> list[Path]:
    """The local folders that a run writes to: the run folder, and those of checkpoints and their temporary files."""
    names: list[str | None] = []
    if ckpt.enable_save_ckpt:
        names = [ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder if ckpt.oss_snapshot_freq else None]
        names += [ckpt.async_upload_tmp_folder] if ckpt.async_upload else []
    return [run_folder, *(Path(normalize_path(name)) for name in names if name and not is_s3(name))]


def disks(folders: Sequence[Path]) -> list[DiskFigures]:
    """One per file system, named after its first folder; folders that do not exist yet are skipped."""
    found: dict[int, DiskFigures] = {}
    for folder in folders:
        try:
            device, usage = folder.stat().st_dev, shutil.disk_usage(folder)
        except OSError:  # does not exist yet, or is gone: the writer will report it
            continue
        found.setdefault(device, DiskFigures(str(folder), usage.free, usage.total))
    return list(found.values())
