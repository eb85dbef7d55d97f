"""tools/convert.py as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_lite.apps.convert.compare_logits import in_fp32
from internlm_lite.apps.convert.to_hf import open_checkpoint
from internlm_lite.apps.convert.tokenizers import generation_config
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.cli import convert, generate_text
from internlm_lite.config.schema import ModelConfig
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError
from internlm_lite.generate.prompts import end_ids
from tests.apps.convert.made import save_ours, small_tokenizer

TEXT = "def f7(x):\n    return x + 7\n  two  spaces, Größe 你好"


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer(tmp_path)
    save_ours(tmp_path / "ours", tokenizer=str(tokenizer.path), vocab_size=300)
    return tmp_path / "ours"


@pytest.mark.parametrize("command", ["to-hf", "to-llama2c"])
def test_an_encoder_decoder_is_refused_in_one_line(command, tmp_path, capsys):
    save_ours(tmp_path / "ours", num_encoder_layers=1, source_vocab_size=64, position="sinusoidal")
    assert run(command, tmp_path / "ours", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.num_encoder_layers: found 1, expected 0: neither" in line and not (tmp_path / "out").exists()


def test_there_and_back_with_the_tokenizer(ours, tmp_path, capsys):
    import transformers

    assert run("to-hf", ours, tmp_path / "hf", "--verify", "--shard-size", "100KB") == 0
    printed = capsys.readouterr().out
    assert "(final, step 4)" in printed and "verified: logits of 64 tokens" in printed and "bound" in printed
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    mine = Tokenizer(tmp_path / "small.model")
    assert theirs.encode(TEXT, add_special_tokens=False) == mine.encode(TEXT)
    assert theirs.encode(TEXT)[0] == mine.bos and theirs.eos_token_id == mine.eos
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 2, 3)

    assert run("from-hf", tmp_path / "hf", tmp_path / "back", "--verify") == 0
    printed = capsys.readouterr().out
    assert "load_model_only_folder" in printed and "verified" in printed
    _, config, _ = open_checkpoint(str(tmp_path / "back"))
    assert config.data.tokenizer == str(tmp_path / "back" / "tokenizer.model")
    # The printed section is the model's.
    section = printed[printed.index("model = dict(") : printed.index("\n)") + 2]
    names: dict = {}
    exec(section, names)
    assert ModelConfig.model_validate(names["model"]) == config.model


def test_generate_takes_what_from_hf_made(ours, tmp_path, capsys, monkeypatch):
    assert run("to-hf", ours, tmp_path / "hf") == 0 and run("from-hf", tmp_path / "hf", tmp_path / "back") == 0
    texts = []
    for folder in (ours, tmp_path / "back"):
        capsys.readouterr()
        arguments = ["--checkpoint", str(folder), "--prompt", "def", "--greedy", "--max-new-tokens", "12"]
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        generate_text.main()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 12


def test_all_end_tokens_go_there_and_back(ours, tmp_path):
    """A chat model has a token for the end of a turn besides that of a text: in generation_config.json alone."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 77]}')
    assert run("to-hf", ours, tmp_path / "hf") == 0 and run("from-hf", tmp_path / "hf", tmp_path / "back") == 0
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 77], "pad_token_id": 3}
    assert end_ids(Tokenizer(tmp_path / "back" / "tokenizer.model")) == {2, 77}


def test_ids_that_the_tokenizer_lacks_are_those_of_generation_config(ours, tmp_path):
    tokenizer = Tokenizer(tmp_path / "small.model")
    tokenizer.bos = tokenizer.pad = None
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 9, "eos_token_id": 0, "top_k": 5}')
    expected = {"bos_token_id": 9, "eos_token_id": [0, 2], "pad_token_id": None, "top_k": 5}
    assert generation_config(tokenizer) == expected


@pytest.mark.parametrize("text", [b"[1]", b"null", b"{", b"\xff", b'{"a":' * 100_000])
def test_a_damaged_generation_config_is_one_error(ours, tmp_path, capsys, text):
    (tmp_path / "generation_config.json").write_bytes(text)
    assert run("to-hf", ours, tmp_path / "hf") == DataError.exit_code
    assert "generation_config.json: found no JSON object" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_difference_is_exit_code_2(ours, tmp_path, capsys):
    assert run("to-hf", ours, tmp_path / "hf") == 0
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(1, 0)
    save_file(weights, path, {"format": "pt"})
    capsys.readouterr()
    checkpoint = str(ours)
    assert convert.verify(checkpoint, tmp_path / "hf", convert.S3Config()) == 2
    assert "NOT THE SAME MODEL" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["to-hf", "from-hf"])
def test_without_transformers_nothing_is_begun(ours, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(command, ours, tmp_path / "out", "--verify") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install internlm_lite[hf]" in error
    assert not (tmp_path / "out").exists()


def test_a_family_that_transformers_does_not_know_is_one_error(ours, tmp_path, capsys, monkeypatch):
    import transformers

    def refuse(*arguments, **options):
        raise ValueError("The checkpoint has model type `olmo9`, but Transformers does not recognize it.\n\nUpdate.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert run("to-hf", ours, tmp_path / "hf", "--verify") == 2
    error = capsys.readouterr().err
    assert "does not load" in error and "`olmo9`" in error and error.count("\n") == 1
    assert (tmp_path / "hf" / "config.json").exists()


def test_without_transformers_conversion_works(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("to-hf", ours, tmp_path / "hf") == 0 and run("from-hf", tmp_path / "hf", tmp_path / "back") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["to-hf", "{}/nothing", "{}/out"], "holds no checkpoint"),
        (["to-hf", "{}/ours", "{}/ours"], "exists: choose a folder"),
        (["to-hf", "{}/ours", "{}/out", "--tokenizer", "{}/no.model"], "tokenizer"),
        (["to-hf", "{}/ours", "{}/out", "--model-type", "internlm"], "num_kv_attention_heads=2: it has 8"),
        (["from-hf", "{}/ours", "{}/out"], "expected model.safetensors"),
        (["from-hf", "{}/ours", "{}/out", "--s3", "insecur=True"], "--s3 insecur"),
    ],
)
def test_mistakes_are_one_clear_error(ours, tmp_path, capsys, arguments, words):
    assert run(*(argument.format(tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or committed(LocalStorage(tmp_path / "out")) == []


@pytest.mark.parametrize(("text", "n_bytes"), [("5GB", 5 * 10**9), ("1.5 kib", 1536), ("7", 7)])
def test_sizes(text, n_bytes):
    assert convert.size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1MB", "0", "1.2.3MB"])
def test_no_sizes(ours, text, capsys):
    with pytest.raises(SystemExit):
        run("to-hf", ours, "out", f"--shard-size={text}")
    assert "expected a size such as 5GB" in capsys.readouterr().err


@pytest.mark.parametrize("merges", [list, " ".join], ids=["pairs", "strings"])
@pytest.mark.parametrize("main", ["tokenizer.json", "tokenizer.model"])
def test_what_a_tokenizer_came_with_goes_there_and_back_byte_for_byte(ours, tmp_path, main, merges):
    """Merges are pairs since tokenizers 0.20; writing a file anew would change its form, and lose what is unknown."""
    assert run("to-hf", ours, tmp_path / "hf") == 0
    vocabulary = {character: token for token, character in enumerate(["</s>", "\n", " ", *"abdefx"])} | {"ab": 9}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merges(["a", "b"])]}
    given = {
        "tokenizer.json": {"version": "1.0", "model": model, "added_tokens": []},
        "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "</s>", "kept": "ñ"},
        "special_tokens_map.json": {"eos_token": "</s>"},
        "added_tokens.json": {"<turn>": 299},
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": {"eos_token_id": [0, 106], "temperature": 0.5},
    }
    for name, content in given.items():
        (tmp_path / "hf" / name).write_text(json.dumps(content, indent=3))
    if main == "tokenizer.json":
        (tmp_path / "hf" / "tokenizer.model").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir() if "token" in path.name}
    before["chat_template.jinja"] = (tmp_path / "hf" / "chat_template.jinja").read_bytes()
    assert run("from-hf", tmp_path / "hf", tmp_path / "back") == 0
    assert Path(open_checkpoint(str(tmp_path / "back"))[1].data.tokenizer).name == main
    assert run("to-hf", tmp_path / "back", tmp_path / "again") == 0
    assert {name: (tmp_path / "again" / name).read_bytes() for name in before} == before and main in before
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    ends = {0, 106} | ({2} if main == "tokenizer.model" else set())
    assert written["temperature"] == 0.5 and set(written["eos_token_id"]) == ends


@pytest.mark.parametrize(("version", "name"), [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.1.0", "dtype")])
def test_the_dtype_is_named_as_the_version_of_transformers_wants_it(version: str, name: str) -> None:
    assert in_fp32(version) == {name: torch.float32}
