"""Converts a folder of Hugging Face weights to one of our checkpoints: fp32 masters, no moments, step 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.convert.families import FORMS
from internlm_lite.apps.convert.hf_config import HFConfig, from_hf
from internlm_lite.apps.convert.hf_folder import HFFolder, read_json
from internlm_lite.apps.convert.recipes import TensorRecipe, our_recipes, sources_of
from internlm_lite.apps.convert.stream import ConvertedFile
from internlm_lite.apps.convert.to_hf import compare_names
from internlm_lite.apps.convert.tokenizers import files_in, main_file
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.format.tensor_file import TensorFile
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.write_alone import require_empty, whole_master, write_alone
from internlm_lite.checkpoint.save.write_plan import WriteItem
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.checkpoint.storage.run_lock import held
from internlm_lite.config.masking import masked
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import Config, S3Config
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.mesh import Sizes

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPARE_ROWS = 1024
_OF_IMAGES = ("vision_tower.", "multi_modal_projector.")
_TEXT_PREFIX = re.compile(r"^(language_model\.model|model\.language_model)\.")
"""By transformers 4.50, and since."""


@dataclass(frozen=True)
class ReadResult:
    """The checkpoint made from a folder."""

    name: str
    """Name of the checkpoint."""
    config: Config
    n_tensors: int
    n_bytes: int
    notes: tuple[str, ...]


def read_hf(
    folder: Path, out: str, s3: S3Config | None = None, *, done: Callable[[str], object] = lambda name: None
) -> ReadResult:
    """Write a checkpoint of the weights in `folder` into the save folder `out`, which must hold none.

    Raises CheckpointError for a model that ours cannot represent, or a damaged folder; StorageError.
    """
    source = HFFolder(folder)
    hf = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if hf.has_images:
        source.rename(_name_of_text)
    names = FORMS[hf.family].names
    prefix = names["layers"].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in source.shapes):  # of the model without its head, as GPT-2's own
        source.rename(lambda name: name if name.startswith(names["output"]) else prefix + name)
    recipes = _checked_recipes(source, hf)
    storage = open_storage(out, s3)
    tokenizer, notes = _tokenizer(folder, storage)
    config = _config(folder, hf, tokenizer)
    with held(storage):
        require_empty(storage)
        for file, content in files_in(folder).items():
            storage.put(file, [content])
        name, n_bytes = _write(storage, source, hf, recipes, config, done)
    return ReadResult(str(name), config, len(recipes), n_bytes, (*hf.notes, *notes))


def _name_of_text(name: str) -> str | None:
    """A tensor of a model of images and text by its name in that of text alone; None: it is of images."""
    if name.removeprefix("model.").startswith(_OF_IMAGES):
        return None
    return _TEXT_PREFIX.sub("model.", name).removeprefix("language_model.")


def _write(
    storage: Storage,
    source: HFFolder,
    hf: HFConfig,
    recipes: Sequence[TensorRecipe],
    config: Config,
    done: Callable[[str], object],
) -> tuple[Name, int]:
    """(name of the checkpoint, its bytes)"""
    by_name = {recipe.name: recipe for recipe in recipes}

    def stream_of(items: Sequence[WriteItem]) -> TensorFile:
        return ConvertedFile({item.key: by_name[item.shard.name] for item in items}, torch.float32, source, done)

    tensors = [whole_master(recipe.name, recipe.shape, "F32") for recipe in recipes]
    layout = {"world": 1, **asdict(Sizes())}
    facts = commit.Facts("final", layout, masked(resolved(config)), {"converted_from": hf.family})
    return write_alone(storage, 0, tensors, stream_of, facts)


def _checked_recipes(source: HFFolder, hf: HFConfig) -> list[TensorRecipe]:
    """The recipes of our tensors. Raises CheckpointError naming tensors that are missing, unknown or ill-shaped."""
    recipes = our_recipes(hf.model, hf.family)
    sizes = sources_of(recipes)
    shapes = source.shapes
    head = f"{FORMS[hf.family].names['output']}.weight"
    if hf.model.tie_word_embeddings and head in shapes:
        _check_tied(source, head, next(recipe for recipe in recipes if recipe.name == "tok_embeddings.weight"))
        del shapes[head]
    if not hf.model.tie_word_embeddings and head not in shapes:
        raise CheckpointError(f"{source.path}: {head} is missing, but config.json says tie_word_embeddings=false")
    compare_names(str(source.path), shapes, set(sizes))
    wrong = [f"{n}: {list(shapes[n])}, config.json says {list(sizes[n])}" for n in sizes if shapes[n] != sizes[n]]
    dtypes = source.dtypes
    wrong += [f"{n}: {dtypes[n]}, expected floating point numbers" for n in sizes if dtypes[n] not in _FLOATS]
    if wrong:
        lines = "\n  ".join(wrong[:12])
        raise CheckpointError(f"{source.path}: tensors of another model than config.json's:\n  {lines}")
    return recipes


def _check_tied(source: HFFolder, head: str, embedding: TensorRecipe) -> None:
    """Raises CheckpointError if the two copies of a tied weight, saved by some versions of transformers, differ."""
    other = embedding.rows[0].name
    n_rows = embedding.shape[0]
    same = source.shapes[head] == embedding.shape and source.shapes.get(other) == embedding.shape
    for start in range(0, n_rows if same else 0, _COMPARE_ROWS):
        rows = (start, min(start + _COMPARE_ROWS, n_rows))
        same = same and torch.equal(source.read(head, *rows), source.read(other, *rows))
    if not same:
        raise CheckpointError(
            f"{source.path}: {head} differs from {other}, but config.json says tie_word_embeddings=true: correct it"
        )


def _tokenizer(folder: Path, storage: Storage) -> tuple[str | None, tuple[str, ...]]:
    """(path of the copy for data.tokenizer, lines for the user)"""
    name = main_file(folder)
    if name is None:
        return None, ("no tokenizer there: set data.tokenizer, or give --tokenizer, where text is needed",)
    if isinstance(storage, LocalStorage):
        return str(storage.root / name), ()
    return None, (f"the tokenizer is {storage.name}/{name}: fetch it and set data.tokenizer where text is needed",)


def _config(folder: Path, hf: HFConfig, tokenizer: str | None) -> Config:
    """A complete config with this model, as every checkpoint contains one."""
    values: dict[str, Any] = {
        "JOB_NAME": folder.resolve().name,
        "data": {"seq_len": hf.max_positions, "total_steps": 1, "tokenizer": tokenizer},
        "lr_scheduler": {"total_steps": 1},
        "model": hf.model,
        "grad_scaler": {} if hf.model.dtype == "torch.float16" else None,
    }
    return Config.model_validate(values)
