"""Which folders a train_folder holds."""

import logging

import numpy as np
import pytest

from internlm_lite.data.folders import find_folders
from internlm_lite.errors import DataError
from tests.data.corpora import write_internlm, write_native


def test_sub_folders_with_data_are_folders(tmp_path, caplog):
    write_native(tmp_path / "docs" / "x" / "y" / "b.bin", [[1, 2]])
    write_native(tmp_path / "docs" / "a.bin", [[3]])
    write_internlm(tmp_path / "code" / "c.bin", [[4, 5, 6]])
    write_native(tmp_path / ".hidden" / "d.bin", [[7]])
    write_native(tmp_path / "docs" / ".half.partial" / "e.bin", [[7]])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no data")
    (tmp_path / "README.md").write_text("a file")
    (tmp_path / "folder.bin").mkdir()
    folders = find_folders(tmp_path, "train_folder")
    assert caplog.records == []
    assert [(f.name, [d.path.name for d in f.files]) for f in folders] == [
        ("code", ["c.bin"]),
        ("docs", ["a.bin", "b.bin"]),
    ]


def test_linked_folders_are_followed(tmp_path):
    write_native(tmp_path / "far" / "deep" / "a.bin", [[1, 2]])
    (tmp_path / "train" / "docs").mkdir(parents=True)
    (tmp_path / "train" / "docs" / "link").symlink_to(tmp_path / "far" / "deep")
    (tmp_path / "train" / "code").symlink_to(tmp_path / "far")
    assert [folder.name for folder in find_folders(tmp_path / "train", "train_folder")] == ["code", "docs"]


def test_folder_with_files(tmp_path):
    write_native(tmp_path / "mine" / "a.bin", [[1, 2]])
    assert [folder.name for folder in find_folders(tmp_path / "mine", "train_folder")] == ["mine"]


def test_files_beside_sub_folders(tmp_path, caplog):
    write_native(tmp_path / "a.bin", [[1, 2]])
    write_native(tmp_path / "docs" / "b.bin", [[1, 2]])
    with caplog.at_level(logging.WARNING, "internlm_lite"):
        assert [folder.name for folder in find_folders(tmp_path, "train_folder")] == ["docs"]
    assert "1 tokenised files directly in" in caplog.text


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"data\.train_folder: .*nowhere is missing"):
        find_folders(tmp_path / "nowhere", "train_folder")
    with pytest.raises(DataError, match=r"data\.valid_folder: .* holds no tokenised data"):
        find_folders(tmp_path, "valid_folder")
    (tmp_path / "file").write_bytes(np.arange(3).tobytes())
    with pytest.raises(DataError, match="is a file, expected a folder"):
        find_folders(tmp_path / "file", "train_folder")


def test_damaged_file(tmp_path):
    write_native(tmp_path / "docs" / "a.bin", [[1, 2]])
    (tmp_path / "docs" / "b.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"docs/b\.bin: found no index"):
        find_folders(tmp_path, "train_folder")
