"""The options of internlm-lite generate, its input and output."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from internlm_lite.cli import generate_text
from internlm_lite.config.schema import ModelConfig, S3Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import StorageError
from internlm_lite.generate import load_model
from tests.apps.convert.made import save_ours, small_tokenizer


def test_settings_of_s3_reach_the_storage(monkeypatch, capsys):
    asked = []

    def refuse(path, mesh, dtype, s3, *, weights):
        asked.append((path, mesh.device, dtype, s3))
        assert weights == "model"
        raise StorageError("it does not speak TLS (for plain http set ckpt.s3.insecure=True)")

    monkeypatch.setattr(load_model, "load_model", refuse)
    where = "boto3:s3://lab.127.0.0.1:1/x"
    options = ["--device", "cpu", "--dtype", "bfloat16", "--s3", "insecure=True"]
    assert generate_text.main(["--checkpoint", where, "--prompt", "a", *options]) == 6
    assert asked == [(where, torch.device("cpu"), "torch.bfloat16", S3Config(insecure=True))]
    assert "(for plain http set --s3 insecure=True)" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate_text.main(["--checkpoint", str(tmp_path), "--prompt", "a", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("MeshError: --device cuda: no GPU is visible on host ") and said.count("\n") == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a checkpoint of a random model in ckpts, trained on 64 tokens."""
    folder = tmp_path_factory.mktemp("saved")
    save_ours(folder / "ckpts", tokenizer=str(small_tokenizer(folder).path), vocab_size=300, init_std=0.3)
    return folder


def told(capsys, saved: Path, *arguments: str, code: int = 0) -> str:
    """What the command writes: to standard output, or to standard error if it must fail."""
    capsys.readouterr()
    assert generate_text.main(["--checkpoint", str(saved / "ckpts"), "--max-new-tokens", "9", *arguments]) == code
    output = capsys.readouterr()
    return output.err if code else output.out


def test_texts_and_json_lines_say_the_same(capsys, saved):
    given = ("--prompt", "def f", "--prompt", "return", "--seed", "4")
    text, rows = told(capsys, saved, *given), told(capsys, saved, *given, "--json").splitlines()
    records = [json.loads(row) for row in rows]
    assert "".join(f"{r['prompt']}{r['text']}\n{'-' * 40}\n" for r in records) == text
    assert [set(r) for r in records] == [{"prompt", "text", "tokens", "ended_by", "seed"}] * 2
    tokenizer = Tokenizer(saved / "small.model")
    start = tokenizer.encode("def f")
    assert tokenizer.decode([*start, *records[0]["tokens"]]) == "def f" + records[0]["text"]
    alone = told(capsys, saved, *given[:2], "--seed", "4")
    assert alone == f"def f{records[0]['text']}\n", "as it is drawn, one prompt; the same whatever is beside it"


def test_prompts_come_from_files_and_standard_input(capsys, saved, monkeypatch, tmp_path):
    texts = ["def f", "return", "  x = 3"]
    by_option = told(capsys, saved, *(word for text in texts for word in ("--prompt", text)), "--json")
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
    assert told(capsys, saved, "--prompts", str(tmp_path / "prompts.txt"), "--json", "--batch-size", "2") == by_option
    lines = b"".join(json.dumps({"prompt": text}).encode() + b"\n" for text in texts)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert told(capsys, saved, "--requests", "-", "--json", "--chunk", "2") == by_option
    monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
    assert told(capsys, saved, "--json") == by_option.splitlines(keepends=True)[0]


def test_a_request_has_its_own_length_stop_and_seed(capsys, saved, tmp_path):
    plain = json.loads(told(capsys, saved, "--prompt", "def f", "--json", "--no-eos"))
    asked = [
        {"prompt": "def f", "max_new_tokens": 3},
        {"prompt": "def f", "stop_ids": [plain["tokens"][4]]},
        {"prompt": "def f", "stop": plain["text"][2:5]},
        {"prompt": "def f", "seed": 99},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(request) + "\n" for request in asked))
    output = told(capsys, saved, "--requests", str(tmp_path / "asked.jsonl"), "--json", "--no-eos")
    short, by_id, by_text, other = [json.loads(row) for row in output.splitlines()]
    assert short["tokens"] == plain["tokens"][:3] and short["ended_by"] == "length"
    assert by_id["tokens"] == plain["tokens"][: plain["tokens"].index(plain["tokens"][4])]
    assert by_text["ended_by"] == "stop" and by_text["text"] == plain["text"][: plain["text"].index(plain["text"][2:5])]
    assert other["tokens"] != plain["tokens"] and other["seed"] == 99
    stopped = told(capsys, saved, "--prompt", "def f", "--stop", plain["text"][2:5], "--no-eos")
    assert stopped == f"def f{by_text['text']}\n"


def test_beams_have_a_score(capsys, saved):
    given = ("--prompt", "def f", "--beams", "3", "--length-penalty", "0.6")
    found = json.loads(told(capsys, saved, *given, "--json"))
    assert found["score"] < 0 and "seed" not in found
    assert told(capsys, saved, *given) == f"def f{found['text']}\n"


def test_a_terminal_gets_nothing_that_controls_it(capsys, saved, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b]0;owned\x07\u202e\n\tok" * (len(ids) > 9))
    raw = told(capsys, saved, "--prompt", "def f")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = told(capsys, saved, "--prompt", "def f\x1b[2J")
    assert "\x1b" in raw and "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert shown.startswith("def f\\x1b[2J") and "\\x1b]0;owned\\x07\\u202e\n\tok" in shown


BAD = {
    "beams and drawing": ("--beams 2 --temperature 0.5 --top-k 3", "--beams with --temperature, --top-k: beam search"),
    "no beams": ("--beams 0", "beams 0: expected at least 1"),
    "a penalty without beams": ("--length-penalty 1", "--length-penalty: expected also --beams K"),
    "a large penalty": ("--beams 2 --length-penalty 99", "length_penalty 99.0: expected a number from -10 to 10"),
    "top-k": ("--top-k -1", "top_k -1: expected 0 (all tokens) or more"),
    "top-p": ("--top-p 0", "top_p 0.0: expected more than 0, at most 1"),
    "min-p": ("--min-p 1.5", "min_p 1.5: expected 0 (all tokens) to 1"),
    "temperature": ("--temperature nan", "temperature nan: expected 0 (greedy) or more"),
    "repetition penalty": ("--repetition-penalty 0", "repetition_penalty 0.0: expected more than 0"),
    "an empty stop string": ("--stop=", "stop_strings ('',): expected a tuple of texts, none of them empty"),
    "a negative stop token": ("--stop-id -4", "stop_ids [-4, 2]: expected token ids, 0 or more"),
    "a long prompt": (f"--prompt {'x' * 300}", "tokens: the model was trained on 64 (data.seq_len); shorten it"),
    "no file": ("--prompts nowhere.txt", "nowhere.txt: No such file or directory"),
    "maps of another kind": ("--attention out.pdf", "--attention out.pdf: expected a file that ends in .html or .png"),
    "a layer that is not there": (
        "--attention out.html --layers 0,2",
        "--layers 0,2: found '2', expected numbers from 0 to 1",
    ),
    "heads that are no numbers": (
        "--attention out.html --heads all",
        "--heads all: found 'all', expected numbers from",
    ),
    "a source": ("--source x", "line 0 has a source, and the model is a decoder alone, which continues prompts: give"),
    "maps of two prompts": ("--attention out.html --prompt b", "--attention with 2 prompts: expected one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, capsys, saved):
    line, found = BAD[case]
    arguments = (
        line.split()
        if "--prompts" in line or "--source" in line
        else [*line.split(), *(() if "x" * 300 in line else ("--prompt", "a"))]
    )
    said = told(capsys, saved, *arguments, code=6 if case == "no file" else 2)
    assert found in said and said.count("\n") == 1


def test_a_prompt_of_no_tokens_is_named(capsys, saved, monkeypatch):
    monkeypatch.setattr(Tokenizer, "bos", None, raising=False)
    bare = Tokenizer.__init__

    def without_bos(self, path):
        bare(self, path)
        self.bos = None

    monkeypatch.setattr(Tokenizer, "__init__", without_bos)
    said = told(capsys, saved, "--prompt", "", code=2)
    assert said.startswith("DataError: prompt 0 is empty: expected at least one token")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("--prompt a --prompts b", "--prompt, --prompts, --source, --sources, --requests: expected one of them"),
        ("--prompt a --layers 0", "--layers, --heads: expected also --attention FILE"),
        ("--prompt a --batch-size 0", "--batch-size 0: expected at least 1"),
        ("--prompt a --chunk 0", "--chunk 0: expected at least 1"),
    ],
)
def test_usage_is_checked_before_anything_is_loaded(line, found, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate_text.main(["--checkpoint", "nowhere", *line.split()])
    assert capsys.readouterr().err.endswith(f"error: {found}\n")


def test_a_long_prompt_runs_if_it_is_wanted(capsys, saved):
    assert told(capsys, saved, "--prompt", "x" * 300, "--max-positions", "400").startswith("x" * 300)


def test_a_prompt_is_refused_before_anything_is_shown(capsys, saved, monkeypatch):
    """By positions that the model does not have, as of learned ones."""
    monkeypatch.setattr(ModelConfig, "most_positions", 5)
    assert generate_text.main(["--checkpoint", str(saved / "ckpts"), "--prompt", "def f(x): return"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "the model has 5 positions" in output.err


def test_maps_are_written(capsys, saved, tmp_path):
    page = tmp_path / "maps.html"
    said = told(capsys, saved, "--prompt", "def f(x):", "--attention", str(page), "--layers", "1", "--heads", "0-2")
    assert said.startswith("3 maps of ") and page.read_text("utf-8").startswith("<!DOCTYPE html>")
