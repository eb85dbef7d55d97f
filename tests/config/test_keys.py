"""The nearest known key of a misspelled one."""

import difflib
import keyword
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from internlm_lite.config.keys import expected, known_keys, names_in, nearest_key, section_of
from internlm_lite.config.load import load_config
from internlm_lite.errors import ConfigError

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
LETTERS = "abcdefghijklmnopqrstuvwxyz_0123456789"


def similarity(name: str, candidate: str) -> float:
    return difflib.SequenceMatcher(None, candidate, name).ratio()


@st.composite
def misspelled_keys(draw: st.DrawFn) -> tuple[str, str]:
    """A known key and the same key with one letter lost, added, changed, or two neighbours swapped.

    Names under five letters are left out: one wrong letter makes them as similar to other keys.
    """
    key = draw(st.sampled_from([key for key in known_keys() if key != "JOB_NAME" and len(key.split(".")[-1]) >= 5]))
    parent, dot, name = key.rpartition(".")
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    typo = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :],
            ]
        )
    )
    assume(typo.isidentifier() and not keyword.iskeyword(typo) and not typo.startswith("_"))
    others = [other for other in names_in(parent) if other != name]
    assume(all(similarity(typo, other) < similarity(typo, name) for other in others))  # adam_beta1, adam_beta2
    assume(parent + dot + typo not in known_keys())
    return key, parent + dot + typo


@given(misspelled_keys())
@settings(max_examples=400, deadline=None)
def test_nearest_key_of_a_typo(pair: tuple[str, str]) -> None:
    key, typo = pair
    assert nearest_key(typo) == key


@given(misspelled_keys())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_typo_in_file_is_reported_with_nearest_key(tmp_path: Path, pair: tuple[str, str]) -> None:
    key, typo = pair
    *parents, name = typo.split(".")
    text = f"{name} = 1\n" if not parents else f"{parents[0]} = dict({'='.join([*parents[1:], ''])}"
    if parents:
        text += f"dict({name}=1))\n" if len(parents) > 1 else f"{name}=1)\n"
    (tmp_path / "typo.py").write_text(f"_base_ = {str(TINY)!r}\n{text}")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "typo.py")
    assert f"typo.py:2: {typo}: unknown key; nearest known key: {key}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("adam.eta_min", "lr_scheduler.eta_min"),
        ("lr", "adam.lr"),
        ("data.checkpoint_every", "ckpt.checkpoint_every"),
        ("model.layers", "model.num_layers"),
        ("hybrid_optimizer", "hybrid_zero_optimizer"),
        ("model.experts", None),
        ("i", None),
    ],
)
def test_nearest_key_in_another_section(key: str, nearest: str | None) -> None:
    assert nearest_key(key) == nearest


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("data.sq_len", "data.seq_len"),
        ("adam.rl", "adam.lr"),
        ("adam.l", "adam.lr"),
        ("dta", "data"),
        ("ckpt.s", "ckpt.s3"),
    ],
)
def test_nearest_key_of_a_short_name(name: str, nearest: str) -> None:
    assert nearest_key(name) == nearest


def test_every_key_has_expected_values_and_a_description() -> None:
    for key, field in known_keys().items():
        assert expected(field) and field.description, key
    words = "True or False or a number >= 0 and <= 1 or one of 'selective', 'offload'"
    assert expected(known_keys()["model.checkpoint"]) == words
    assert expected(known_keys()["data.weights"]) == "a dict (name: a number > 0) or None"
    assert section_of(known_keys()["grad_scaler"]) is not None
