"""Save and load of one process: what comes back, what goes, and what is said when it cannot be done."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.manager import CheckpointManager
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.saver import SaveOptions
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.run_lock import holder
from internlm_lite.errors import CheckpointError, ConfigError, PeerLostError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import single_process_mesh
from tests.checkpoint.pieces import MODEL, assert_true_values, pieces_of

STATE = {"step": 7, "loss": 0.1 + 0.2, "skip": [1, 2], "data": {"epoch": 0, "name": "köln", "none": None, "ok": True}}


def _manager(folder: Path | str, **options: Any) -> CheckpointManager:
    return CheckpointManager(str(folder), single_process_mesh(), **options)


def _save(manager: CheckpointManager, step: int = 7, kind: Any = "snapshot", state: Any = STATE) -> str:
    return manager.save(step, kind, pieces_of(0, fill=True), state, {"cpu": torch.get_rng_state()})


def test_round_trip(tmp_path: Path) -> None:
    rng = torch.get_rng_state()
    manager = _manager(f"local:{tmp_path}/save", config={"model": {"hidden": 8}})
    name = _save(manager)
    pieces = pieces_of(0, fill=False)
    restored = _manager(tmp_path / "save").resume(pieces)
    assert restored is not None and restored.found.name == name and restored.found.step == 7
    assert_true_values(pieces)
    assert restored.state == STATE
    assert restored.rank_state is not None and torch.equal(restored.rank_state["cpu"], rng)
    manifest = restored.found.manifest
    assert manifest.config == {"model": {"hidden": 8}} and manifest.layout["world"] == 1
    assert manifest.versions["torch"] == torch.__version__


def test_the_files_are_those_of_the_protocol(tmp_path: Path) -> None:
    name = _save(_manager(tmp_path), step=120)
    assert name.startswith("0000000120-00001.")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        f"commits/{name}.json",
        f"data/{name}/manifest.json",
        f"data/{name}/rank-00000.safetensors",
        f"data/{name}/rank-00000.vote.json",
    ]
    commit = json.loads((tmp_path / files[0]).read_text())["body"]
    assert commit["step"] == 120 and commit["kind"] == "snapshot" and commit["manifest"] == files[1]
    assert json.loads((tmp_path / files[1]).read_text())["body"]["state"] == STATE
    stored = safetensors.torch.load_file(tmp_path / files[2])
    assert {key for key in stored if key.startswith("master/")} == {f"master/{name}" for name in MODEL}


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    manager = _manager(tmp_path / "save")
    assert manager.latest() is None and manager.resume(pieces_of(0, fill=False)) is None
    assert os.listdir(tmp_path / "save") == []


def test_newest_is_the_last_saved_also_after_going_back(tmp_path: Path) -> None:
    manager = _manager(tmp_path, saving=SaveOptions(keep_snapshots=9))
    for step in (100, 200, 300):
        _save(manager, step)
    back = _save(_manager(tmp_path, saving=SaveOptions(keep_snapshots=9)), 150)
    twice = [_save(manager, 150), _save(manager, 150)]
    assert len({back, *twice}) == 3
    found = manager.latest()
    assert found is not None and found.name == twice[1]


def test_rotation_keeps_snapshots_and_all_milestones(tmp_path: Path) -> None:
    manager = _manager(tmp_path, saving=SaveOptions(keep_snapshots=2))
    kinds = ["snapshot", "milestone", "snapshot", "snapshot", "rescue", "final", "snapshot"]
    names = [_save(manager, step, kind) for step, kind in enumerate(kinds)]
    kept = [names[1], names[4], names[5], names[6]]
    assert sorted(os.listdir(tmp_path / "data")) == sorted(kept)
    assert sorted(os.listdir(tmp_path / "commits")) == sorted(f"{name}.json" for name in kept)


def test_keep_removes_old_milestones(tmp_path: Path) -> None:
    options = SaveOptions(keep_milestones=2)
    manager = _manager(tmp_path, saving=options)
    kinds = ["milestone", "final", "milestone", "snapshot", "milestone", "milestone"]
    names = [_save(manager, step, kind) for step, kind in enumerate(kinds)]
    assert sorted(os.listdir(tmp_path / "data")) == sorted([names[1], *names[3:]])
    (tmp_path / f"data/{names[5]}/rank-00000.safetensors").write_bytes(b"")
    newer = _save(manager, 6, "milestone")
    assert {names[4], names[5], newer} <= set(os.listdir(tmp_path / "data")), "a damaged one is not counted"
    for folder in manager.folders:
        folder.resumed_from = names[4]
    last = [_save(manager, step, "milestone") for step in (7, 8)]
    assert sorted(os.listdir(tmp_path / "data")) == sorted([names[1], names[3], names[4], *last])


def test_rotation_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    good, bad = _save(manager, 1), _save(manager, 2)
    (tmp_path / f"data/{bad}/rank-00000.safetensors").write_bytes(b"")
    restored = manager.resume(pieces_of(0, fill=False))
    assert restored is not None and restored.found.name == good
    payload = tmp_path / f"data/{_save(manager, 3)}/rank-00000.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    restored = manager.resume(pieces_of(0, fill=False))
    assert restored is not None and restored.found.name == good
    _save(manager, 4)
    assert (tmp_path / f"commits/{good}.json").exists(), "the only good one beside the newest"


def test_keep_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        _manager(tmp_path, saving=SaveOptions(keep_snapshots=1))


def test_foreign_files_are_left_alone_and_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model_tp0_pp0.pt").write_bytes(b"pickle")
    manager = _manager(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert manager.latest() is None
    assert "no checkpoint of this program, such as model_tp0_pp0.pt" in caplog.text
    for name in ("commits/notes.txt", "commits/.x.swp", "data/readme"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    name = _save(manager)
    found = manager.latest()
    assert found is not None and found.name == name
    assert (tmp_path / "commits/notes.txt").exists() and (tmp_path / "data/readme").exists()


def test_dtype_is_cast_and_weights_alone_can_be_taken(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    _save(manager)
    weights = [
        LocalShard(p.name, p.role, p.shape, p.box, p.flat_range, p.tensor.to(torch.bfloat16))
        for p in pieces_of(0, roles=["master"], fill=False)
    ]
    found = manager.latest()
    assert found is not None
    manager.load(found, weights)
    assert_true_values(weights, torch.bfloat16)


def test_roles_that_a_checkpoint_does_not_have_are_named(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    manager.save(1, "final", pieces_of(0, roles=["master"], fill=True), {})
    found = manager.latest()
    assert found is not None
    pieces = pieces_of(0, fill=False)
    with pytest.raises(CheckpointError, match=r"exp_avg: the checkpoint has none \(it has master\)"):
        manager.load(found, pieces)
    assert all(piece.tensor.isnan().all() for piece in pieces), "nothing is read"


def test_another_model_is_explained(tmp_path: Path) -> None:
    _save(_manager(tmp_path, config={"model": {"hidden_size": 8, "vocab_size": 12}, "seed": 1}))
    pieces = [piece for piece in pieces_of(0, fill=False) if piece.name != "norm.weight"]
    wide = LocalShard("output.weight", "master", (12, 16), ((0, 12), (0, 16)), None, torch.zeros(12, 16))
    pieces = [wide if (p.name, p.role) == ("output.weight", "master") else p for p in pieces]
    pieces.append(LocalShard("layers.1.new", "master", (3,), ((0, 3),), None, torch.zeros(3)))
    manager = _manager(tmp_path, config={"model": {"hidden_size": 16, "vocab_size": 12}, "seed": 2})
    with pytest.raises(CheckpointError) as caught:
        manager.resume(pieces)
    text = str(caught.value)
    for words in (
        "belongs to another model",
        "output.weight: checkpoint [12, 8], model [12, 16]",
        "only in the model (1):\n    layers.1.new [3]",
        "only in the checkpoint (1):\n    norm.weight [7]",
        "belongs to another model:\n  model.hidden_size 8 in the checkpoint, 16 in this run\n",
        "use the config the checkpoint was saved with",
    ):
        assert words in text, text
    assert "vocab_size" not in text and "seed" not in text
    assert len(set(lines := text.splitlines())) == len(lines), "each tensor once"


def test_another_function_of_the_same_shapes_is_refused_but_for_its_weights_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"num_attention_heads": 4, "num_kv_attention_heads": None, "apply_post_layer_norm": True}
    _save(_manager(tmp_path, config={"model": model}))
    same = {"num_kv_attention_heads": 4, "norm_position": "post", "apply_post_layer_norm": False}
    _manager(tmp_path, config={"model": model | same}).resume(pieces_of(0, fill=False))
    other = model | {"norm_position": "reordered", "apply_post_layer_norm": False, "zero_centered_norm": True}
    manager, pieces = _manager(tmp_path, config={"model": other}), pieces_of(0, fill=False)
    found = "model.norm_position: checkpoint 'post', this run 'reordered'"
    with pytest.raises(CheckpointError, match=rf"another function .*\n.*{found}"):
        manager.resume(pieces)
    manager.load_at(str(tmp_path), [piece for piece in pieces if piece.role == "master"])
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"another function of the same weights: {found}",
        "another function of the same weights: model.zero_centered_norm: checkpoint False, this run True",
    ]


def test_a_config_of_another_version_is_refused_by_its_first_key(tmp_path: Path) -> None:
    _save(_manager(tmp_path, config={"data": {"seq_len": "long"}}))
    found = _manager(tmp_path).latest()
    assert found is not None
    with pytest.raises(
        CheckpointError, match=r"cannot read the config it was saved with: .* keys, first data\.seq_len"
    ):
        found.config()


def test_load_plan_says_what_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = _save(_manager(tmp_path, config={"a": {"b": 1}}))
    with caplog.at_level(logging.INFO):
        _manager(tmp_path, config={"a": {"b": 2}}).resume(pieces_of(0, roles=["master"], fill=False))
    for words in (
        "LOAD PLAN",
        f"local:{tmp_path}",
        name,
        "step 7",
        "world=1 dp=1",
        "master (7 tensors, ",
        "a.b: 1 -> 2",
    ):
        assert words in caplog.text, caplog.text
    assert "not taken   exp_avg (7 tensors" in caplog.text


def test_a_long_load_plan_says_how_much_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(_manager(tmp_path, config={f"key{n:02d}": 1 for n in range(15)}))
    with caplog.at_level(logging.INFO):
        _manager(tmp_path, config={f"key{n:02d}": 2 for n in range(15)}).resume(pieces_of(0, fill=False))
    assert "config      key11: 1 -> 2\n  config      ... and 3 more" in caplog.text and "key12" not in caplog.text


@pytest.mark.parametrize("where", ["{tmp}/file/save", "/proc/nothing/save"])
def test_unwritable_folder_is_found_at_construction(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write local:"):
        _manager(where.format(tmp=tmp_path))
    manager = _manager("/proc/nothing/save", saving=None)
    assert manager.latest() is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": float("nan")}, "state.a: nan"),
        ({"a": (1, 2)}, "state.a: tuple"),
        ({"a": [{"b": {1: 2}}]}, r"state.a\[0\].b: key 1"),
        ({"a": torch.zeros(1)}, "state.a: Tensor"),
        ({"a": "\ud800"}, "state.a"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], words: str) -> None:
    manager = _manager(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        _save(manager, state=state)
    with pytest.raises(CheckpointError, match="expected 1-D torch"):
        manager.save(1, "final", [], {}, {"rng": torch.zeros(3)})
    assert os.listdir(tmp_path) == []


def test_big_numbers_survive(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    state = {"big": 2**80, "small": 5e-324, "huge": 1.7976931348623157e308, "third": 1 / 3, "minus": -0.0}
    _save(manager, state=state)
    found = manager.latest()
    assert found is not None and found.manifest.state == state


def test_open_takes_every_spelling_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = _manager(tmp_path / "save", saving=SaveOptions(keep_snapshots=5))
    first, second = _save(manager, 1), _save(manager, 2)
    other = _manager(tmp_path / "other")
    save = tmp_path / "save"
    assert other.open(str(save)).name == second
    assert other.open(f"local:{save}/").name == second
    for path in (
        f"{save}/commits/{first}.json",
        f"{save}/data/{first}",
        f"local:{save}/data/{first}/",
        f"{save}/{first}",
    ):
        assert other.open(path).name == first, path
    monkeypatch.chdir(save)
    assert other.open(first).name == other.open(f"data/{first}").name == other.open(f"local:{first}").name == first
    copy = tmp_path / "copy"
    (save / "data" / first).rename(copy)
    pieces = pieces_of(0, fill=False)
    restored = other.load(other.open(str(copy)), pieces)
    assert restored.state == STATE
    assert_true_values(pieces)
    with pytest.raises(CheckpointError, match=r"is missing|does not exist"):
        other.open(f"{save}/data/{first}")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        other.open(str(tmp_path / "nowhere"))


def test_a_step_names_its_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = _manager(tmp_path / "save", snapshot_folder=str(tmp_path / "save" / "snapshot"))
    names = [_save(manager, step, kind) for step, kind in ((1, "milestone"), (2, "snapshot"), (1, "milestone"))]
    other = _manager(tmp_path / "other")
    for path in (f"{tmp_path}/save/1", f"local:{tmp_path}/save/1/", f"{tmp_path}/save/0001"):
        assert other.open(path).name == names[2], path
    assert other.open(f"{tmp_path}/save/2").name == names[1], "in the folder inside"
    monkeypatch.chdir(tmp_path / "save")
    assert other.open("1").name == names[2]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*/save; the steps there: 1, 2"):
        other.open(f"{tmp_path}/save/3")
    with pytest.raises(CheckpointError, match="the steps there: none"):
        other.open(f"{tmp_path}/nowhere/3")
    _save(_manager(tmp_path / "save" / "9"), 5)
    assert other.open(f"{tmp_path}/save/9").step == 5, "a folder of that name"


def test_incomplete_pieces_are_not_committed(tmp_path: Path) -> None:
    manager = _manager(tmp_path)
    _save(manager, 1)
    pieces = pieces_of(0, fill=True)
    box = ((0, 12), (0, 4))
    half = LocalShard("output.weight", "master", (12, 8), box, None, torch.zeros(12, 4))
    pieces = [half if (p.name, p.role) == ("output.weight", "master") else p for p in pieces]
    with pytest.raises(CheckpointError, match=r"master of output.weight is not stored exactly once:\s+gap: 48 of 96"):
        manager.save(2, "snapshot", pieces, {})
    found = manager.latest()
    assert found is not None and found.step == 1
    assert os.listdir(tmp_path / "data") == [found.name]


class _KilledError(BaseException):
    """The process dies here: nothing catches it, nothing is cleaned up."""


class _DyingStorage(LocalStorage):
    """Dies before, or in the middle of, its n-th change."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def _count(self) -> None:
        if self.left == 0:
            raise _KilledError
        self.left -= 1

    def put(self, key: str, chunks: Iterable[Any]) -> int:
        self._count()

        def dying() -> Iterable[Any]:
            for chunk in chunks:
                self._count()
                yield chunk

        return super().put(key, dying())

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._count()
        done = super().put_if_absent(key, data)
        self._count()
        return done

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)

    def delete_folder(self, folder: str) -> None:
        self._count()
        super().delete_folder(folder)


def test_a_crash_at_any_point_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for after in range(1000):
        root = tmp_path / str(after)
        manager = _manager(root)
        for step in (1, 2):
            _save(manager, step)
        manager.folders[0].storage = _DyingStorage(root, after)
        died = False
        try:
            manager.save(3, "snapshot", pieces_of(0, fill=True), {"step": 3})
        except _KilledError:
            died = True
        pieces = pieces_of(0, fill=False)
        restored = _manager(root).resume(pieces)
        assert restored is not None and restored.found.rejected == ()
        assert_true_values(pieces)
        assert restored.state == ({"step": 3} if restored.found.step == 3 else STATE)
        outcomes.append(restored.found.step)
        _save(_manager(root), 4)
        if not died:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3} and len(outcomes) > 25


def _failing(storage: LocalStorage, method: str, match: str) -> Callable[..., Any]:
    original = getattr(storage, method)

    def fail(key: str, data: Any) -> Any:
        if match in key:
            raise StorageError(f"cannot write {key}: the disk is full")
        return original(key, data)

    return fail


@pytest.mark.parametrize(
    ("method", "match"), [("put", "safetensors"), ("put", "vote"), ("put", "manifest"), ("put_if_absent", "commits")]
)
def test_a_failed_save_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, match: str
) -> None:
    manager = _manager(tmp_path)
    first = _save(manager, 1)
    with monkeypatch.context() as patch:
        patch.setattr(manager.storage, method, _failing(manager.storage, method, match))
        with pytest.raises(StorageError, match="the disk is full"):
            _save(manager, 2)
    assert os.listdir(tmp_path / "data") == [first]
    third = _save(manager, 3)
    found = manager.latest()
    assert found is not None and found.name == third


def test_what_a_crash_left_is_removed_when_it_is_old(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = _manager(tmp_path)
    names = [_save(manager, step) for step in (1, 2, 3)]
    old, young = names[1], names[2]
    for name in (old, young):
        os.unlink(tmp_path / f"commits/{name}.json")
    with caplog.at_level(logging.WARNING):
        assert _manager(tmp_path).latest() is None
    assert "no committed checkpoint; unfinished saves" in caplog.text and old in caplog.text
    past = time.time() - catalog.ORPHAN_SECONDS - 10
    for path in (tmp_path / "data" / old).iterdir():
        os.utime(path, (past, past))
    last = _save(_manager(tmp_path), 4)
    assert sorted(os.listdir(tmp_path / "data")) == sorted([young, last])


def test_a_missing_vote_names_its_rank(tmp_path: Path) -> None:
    from internlm_lite.checkpoint.format.manifest import Name
    from internlm_lite.checkpoint.save.commit import await_votes

    name = Name(1, 5, "abcdef")
    storage = LocalStorage(tmp_path)
    storage.put(name.vote(1), [b"x"])
    with pytest.raises(StorageError, match=r"no vote from rank 0, 2 after 0.1 s; nothing was committed"):
        await_votes(storage, name, 3, 0.1, threading.Event(), poll_seconds=0.01)


def test_a_checkpoint_that_is_committed_stays_when_what_follows_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(tmp_path)

    def away(*_: Any) -> Any:
        raise StorageError("the medium failed")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "inspect", away)
        first = _save(manager, 1, "final")
    assert "was not read back: the medium failed" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "FORMAT", 2)  # what was saved so far is of another version
        manager.folders[0]._sweep_at = 0
        patch.setattr(catalog, "sweep", away)
        patch.setattr(commit, "FORMAT", 2)
        names = [_save(manager, step, "snapshot") for step in (2, 3, 4)]
    assert "removing old checkpoints failed: the medium failed" in caplog.text
    kept = [first, *names[1:]]
    assert sorted(os.listdir(tmp_path / "data")) == sorted(kept)
    last = _save(manager, 5)
    assert sorted(os.listdir(tmp_path / "data")) == sorted([*kept, last]), "of other versions nothing counts as good"


def test_one_that_was_committed_though_its_save_failed_goes_after_the_next_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = _manager(tmp_path)
    original = manager.storage.put_if_absent

    def lost_answer(key: str, data: bytes) -> bool:
        original(key, data)
        raise StorageError("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(manager.storage, "put_if_absent", lost_answer)
        with pytest.raises(StorageError, match="the connection broke"):
            _save(manager, 1, "final")
    found = manager.latest()
    assert found is not None and found.step == 1, "until there is another one it is better than nothing"
    assert os.listdir(tmp_path / "data") != [_save(manager, 2)] == os.listdir(tmp_path / "data")


def test_leftovers_that_were_young_go_when_they_are_old(tmp_path: Path) -> None:
    left = _save(_manager(tmp_path), 1)
    os.unlink(tmp_path / f"commits/{left}.json")
    manager = _manager(tmp_path)
    first = _save(manager, 2)
    past = time.time() - catalog.ORPHAN_SECONDS - 10
    for path in (tmp_path / "data" / left).iterdir():
        os.utime(path, (past, past))
    second = _save(manager, 3)
    assert sorted(os.listdir(tmp_path / "data")) == sorted([left, first, second]), "looked for now and then only"
    manager.folders[0]._sweep_at -= catalog.ORPHAN_SECONDS
    assert sorted([first, second, _save(manager, 4, "milestone")]) == sorted(os.listdir(tmp_path / "data"))


def test_rotation_reads_a_commit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, read = _manager(tmp_path), []
    original = manager.storage.read
    monkeypatch.setattr(manager.storage, "read", lambda key, *rest: read.append(key) or original(key, *rest))
    for step in range(5):
        _save(manager, step, "milestone")
    read.clear()
    name = _save(manager, 6, "milestone")
    assert {key for key in read if key.startswith("commits/")} == {f"commits/{name}.json"}


def test_a_save_folder_is_searched_with_those_inside_it(tmp_path: Path) -> None:
    outer = _manager(tmp_path, snapshot_folder=f"{tmp_path}/snapshot")
    order = [_save(outer, step, kind) for step, kind in enumerate(("snapshot", "milestone", "snapshot"))]
    found = outer.open(str(tmp_path))
    assert (found.name, found.folder) == (order[2], f"snapshot/data/{order[2]}")
    for damaged in (2, 1):  # bytes of a tensor: only who loads it sees that
        (path,) = tmp_path.rglob(f"{order[damaged]}/rank-00000.safetensors")
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    pieces = pieces_of(0, fill=False)
    restored = _manager(tmp_path, saving=None).load_at(str(tmp_path), pieces)
    assert restored.found.name == order[0] and [text.split(":")[0] for text in restored.found.rejected] == order[:0:-1]
    assert_true_values(pieces)
    with pytest.raises(CheckpointError, match="damaged in bytes"):
        outer.load_at(f"{tmp_path}/data/{order[1]}", pieces_of(0, fill=False))
    shutil.rmtree(tmp_path / "commits")
    assert _manager(tmp_path, saving=None).open(str(tmp_path)).folder.startswith("snapshot/")


def test_a_hugging_face_folder_names_the_tool(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tools/convert\.py from-hf"):
        _manager(tmp_path, saving=None).open(str(tmp_path))


def test_a_lease_is_given_back_when_the_others_are_lost_as_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(str(tmp_path), single_process_mesh())

    def lost(*_: object) -> None:
        assert holder(manager.storage) is not None
        raise PeerLostError("rank 1 is gone")

    monkeypatch.setattr(comm, "broadcast_object", lost)
    with pytest.raises(PeerLostError):
        manager.lock()
    manager.release()
    assert holder(manager.storage) is None
