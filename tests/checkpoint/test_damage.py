"""Any flipped bit and any cut, in any file of a checkpoint, is found when it is loaded: the file is named, the tensor
too where it is one, and the checkpoint before is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm_lite.checkpoint.admin.verify import damages_in
from internlm_lite.checkpoint.format.tensor_file import BLOCK_BYTES, parse_header
from internlm_lite.checkpoint.load.checkpoint_loader import Restored
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.errors import CheckpointError, DamagedError
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import assert_true_values, pieces_of
from tests.faults.extent import number

FILES = ("commits/{}.json", "data/{}/manifest.json", "data/{}/rank-00000.vote.json", "data/{}/rank-00000.safetensors")
PARTS = ("payload", "header", "manifest", "vote", "commit")
FLIPS, CUTS = 100, 20
"""Of each part in `make faults`; in the test suite a fifth and a fourth."""


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    private = {"rng": torch.arange(100, dtype=torch.uint8)}
    return [manager.save(step, "milestone", pieces_of(0, fill=True), {"step": step}, private) for step in (1, 2)]


def _resume(folder: Path) -> Restored:
    pieces = pieces_of(0, fill=False)
    restored = CheckpointManager(str(folder), single_process_mesh(), saving=None).resume(pieces)
    assert restored is not None
    assert_true_values(pieces)
    assert restored.rank_state is not None and restored.rank_state["rng"].tolist() == list(range(100))
    return restored


def _expect_fallback(folder: Path, names: list[str], file: str) -> str:
    restored = _resume(folder)
    assert restored.found.name == names[0] and restored.state == {"step": 1}
    (reason,) = restored.found.rejected
    assert f"{folder}/{file}" in reason, reason
    return reason


def _file_of(part: str, name: str) -> str:
    """Key of the file that holds this part of checkpoint `name`."""
    return FILES[{"commit": 0, "manifest": 1, "vote": 2}.get(part, 3)].format(name)


def _bounds(part: str, good: bytes) -> range:
    """Bytes of the file that belong to the part."""
    header_bytes = int.from_bytes(good[:8], "little") + 8
    return {"header": range(header_bytes), "payload": range(header_bytes, len(good))}.get(part, range(len(good)))


@pytest.mark.parametrize("part", PARTS)
def test_flipped_bits_are_found(tmp_path: Path, names: list[str], part: str) -> None:
    name = _file_of(part, names[1])
    path = tmp_path / name
    good = path.read_bytes()
    rng = random.Random(part)
    for _ in range(number(FLIPS, 20)):
        place = rng.choice(_bounds(part, good))
        raw = bytearray(good)
        raw[place] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        reason = _expect_fallback(tmp_path, names, name)
        if name.endswith("safetensors"):
            _check_tensor_named(good, place, reason)
    path.write_bytes(good)
    assert _resume(tmp_path).found.name == names[1]


@pytest.mark.parametrize("part", PARTS)
def test_cuts_are_found(tmp_path: Path, names: list[str], part: str) -> None:
    name = _file_of(part, names[1])
    path = tmp_path / name
    good = path.read_bytes()
    rng = random.Random(part)
    for _ in range(number(CUTS, 5)):
        path.write_bytes(good[: rng.choice(_bounds(part, good))])
        _expect_fallback(tmp_path, names, name)


def _check_tensor_named(good: bytes, place: int, reason: str) -> None:
    header_bytes = int.from_bytes(good[:8], "little") + 8
    if place < header_bytes:
        assert ": header: crc32" in reason
        return
    (key,) = (
        key
        for key, stored in parse_header(good[:header_bytes], len(good)).items()
        if stored.start <= place < stored.stop
    )
    assert f"tensor {key}: damaged in bytes" in reason, reason


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["longer", "gone", "link"])
def test_other_sizes_and_missing_files_are_found(tmp_path: Path, names: list[str], file: str, change: str) -> None:
    name = file.format(names[1])
    path = tmp_path / name
    good = path.read_bytes()
    if change == "gone" and name.startswith("commits"):
        path.unlink()
        assert _resume(tmp_path).found.name == names[0]  # without its commit it was never there
        return
    changes: dict[str, Callable[[], object]] = {
        "longer": lambda: path.write_bytes(good + b"\0"),
        "gone": path.unlink,
        "link": lambda: path.rename(tmp_path / "aside") and path.symlink_to(tmp_path / "aside"),
    }
    changes[change]()
    _expect_fallback(tmp_path, names, name)


def test_swapped_files_are_found(tmp_path: Path, names: list[str]) -> None:
    for file in FILES[:3]:
        one, two = (tmp_path / file.format(name) for name in names)
        good = two.read_bytes()
        two.write_bytes(one.read_bytes())
        _expect_fallback(tmp_path, names, FILES[1].format(names[1]) if "manifest" in file else file.format(names[1]))
        two.write_bytes(good)


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / f"commits/{names[0]}.json").write_bytes(b"{}")
    payload = tmp_path / f"data/{names[1]}/rank-00000.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoint\(s\), all damaged") as caught:
        CheckpointManager(str(tmp_path), single_process_mesh()).resume(pieces_of(0, fill=False))
    assert names[0] in str(caught.value) and "tensor rank_state/rng" in str(caught.value)


def test_damages_lists_every_damaged_thing(tmp_path: Path, names: list[str]) -> None:
    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    found = manager.latest()
    assert found is not None and list(damages_in(found)) == []
    payload = tmp_path / f"data/{names[1]}/rank-00000.safetensors"
    raw = bytearray(payload.read_bytes())
    header = parse_header(bytes(raw[: int.from_bytes(raw[:8], "little") + 8]), len(raw))
    for key in ("master/norm.weight", "rank_state/rng"):
        raw[header[key].start] ^= 1
    payload.write_bytes(raw)
    vote = tmp_path / f"data/{names[1]}/rank-00000.vote.json"
    vote.write_bytes(vote.read_bytes()[:-2] + b" \n")
    lines = [str(damage) for damage in damages_in(found)]
    assert len(lines) == 3
    for words in ("rank-00000.vote.json", "tensor master/norm.weight", "tensor rank_state/rng"):
        assert any(words in line for line in lines), lines


def test_numbers_that_are_not_finite_are_reported_and_passed_over(tmp_path: Path, names: list[str]) -> None:
    pieces = pieces_of(0, fill=True)
    piece = next(piece for piece in pieces if (piece.role, piece.name) == ("exp_avg", "norm.weight"))
    piece.tensor.view(-1)[3] = -torch.inf
    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    ruined = manager.save(3, "milestone", pieces, {"step": 3})
    found = manager.latest()
    assert found is not None and found.name == ruined
    (line,) = [str(damage) for damage in damages_in(found)]
    assert line.endswith("tensor exp_avg/norm.weight: holds NaN or infinity: the run had diverged when it was saved")
    restored = _resume(tmp_path)
    assert restored.found.name == names[1]
    (reason,) = restored.found.rejected
    assert reason.endswith("exp_avg of norm.weight holds NaN or infinity: the run had diverged"), reason


def test_a_resealed_lie_is_found(tmp_path: Path, names: list[str]) -> None:
    """A manifest whose dump_with_crc fits but whose pieces leave a gap or point elsewhere is refused all the same."""
    from internlm_lite.checkpoint.format.manifest import Manifest, dump_with_crc, load_with_crc

    copy = tmp_path / "copy"
    (tmp_path / "data" / names[1]).rename(copy)
    path = copy / "manifest.json"
    good = load_with_crc(Manifest, path.read_bytes(), "here")
    entry = good.tensors["master"]["norm.weight"]
    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    for piece, words in (
        ({"file": "../../rank-00000.safetensors"}, "String should match pattern"),
        ({"box": ((0, 6),)}, "master of norm.weight: gap"),
        ({"box": ((0, 7), (0, 1))}, "does not lie inside"),
        ({"key": "master/output.weight"}, "the manifest says otherwise"),
        ({"key": "nothing"}, "is not in the file's header"),
        ({"crc32": ()}, "the manifest says otherwise"),
        ({"file": "rank-00001.safetensors"}, "no facts about rank-00001.safetensors"),
    ):
        lie = entry.model_copy(update={"pieces": (entry.pieces[0].model_copy(update=piece),)})
        tensors = good.tensors | {"master": good.tensors["master"] | {"norm.weight": lie}}
        path.write_bytes(dump_with_crc(good.model_copy(update={"tensors": tensors})))
        with pytest.raises(CheckpointError, match=words):
            manager.load(manager.open(str(copy)), pieces_of(0, fill=False))


def test_a_part_of_a_large_tensor_reads_and_checks_its_blocks_only(tmp_path: Path) -> None:
    rows, columns = 3072, 1024  # three blocks
    whole = torch.randn(rows, columns)
    manager = CheckpointManager(str(tmp_path), single_process_mesh())
    box = ((0, rows), (0, columns))
    name = manager.save(1, "final", [LocalShard("w", "master", (rows, columns), box, None, whole)], {})
    path = tmp_path / f"data/{name}/rank-00000.safetensors"
    good = path.read_bytes()
    start = len(good) - whole.nbytes
    wanted = ((1100, 1200), (10, 1000))
    found = manager.latest()
    assert found is not None
    for place in (0, BLOCK_BYTES, 2 * BLOCK_BYTES - 1, 2 * BLOCK_BYTES):
        raw = bytearray(good)
        raw[start + place] ^= 1
        path.write_bytes(raw)
        reader = Reader(found)
        piece = LocalShard("w", "master", (rows, columns), wanted, None, torch.empty(100, 990))
        if BLOCK_BYTES <= place < 2 * BLOCK_BYTES:
            with pytest.raises(
                DamagedError, match=f"tensor master/w: damaged in bytes {BLOCK_BYTES}..{2 * BLOCK_BYTES}"
            ):
                reader.fill(piece)
        else:
            reader.fill(piece)
            assert torch.equal(piece.tensor, whole[1100:1200, 10:1000])
        assert reader.bytes_read == BLOCK_BYTES
