"""Good configs: the demos, overrides, inheritance, other spellings, and where each value came from."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.config import foreign
from internlm_lite.config.keys import known_keys
from internlm_lite.config.load import LoadedConfig, check_config, load_config
from internlm_lite.config.masking import masked
from internlm_lite.config.overrides import parse_overrides
from internlm_lite.config.render_config import print_config, resolved
from internlm_lite.config.schema import AlertsConfig
from internlm_lite.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEED = Path(__file__).parent / "data" / "seed_20b.py"
TINY = ROOT / "configs" / "tiny.py"


def load(folder: Path, text: str, *overrides: str, name: str = "x.py") -> LoadedConfig:
    """A config of the tiny model with `text` laid over it."""
    (folder / name).write_text(f"_base_ = {str(TINY)!r}\n{text}")
    return load_config(folder / name, overrides)


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, text, *overrides)
    return str(error.value)


def test_seed_config_loads_unchanged() -> None:
    loaded = load_config(SEED)
    check_config(loaded, 16)
    config = loaded.config
    assert config.JOB_NAME == "20b_train" and loaded.notes == ()
    assert (config.model.mlp_hidden_size, config.model.head_size, config.model.kv_heads) == (13824, 128, 40)
    assert config.model.torch_dtype_name == "float16"
    assert config.data.micro_num * config.data.micro_bsz * config.data.seq_len == 16384
    assert config.lr_scheduler.total_steps == config.data.total_steps == 50000
    assert (config.ckpt.oss_snapshot_freq, config.ckpt.snapshot_ckpt_folder) == (25, "local:llm_ckpts/snapshot")
    assert config.hybrid_zero_optimizer.reduce_bucket_size == 2**29
    assert config.grad_scaler is not None and config.grad_scaler.fp16.initial_scale == 65536


def test_seed_config_with_boto3_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = tmp_path / "seed_20b_boto3.py"
    lines = SEED.read_text().splitlines()
    first = lines.index("# import os")
    lines[first : first + 4] = [line.removeprefix("# ") for line in lines[first : first + 4]]
    seed.write_text("\n".join(lines))
    monkeypatch.setenv("BOTO3_IP", "10.0.0.1:9000")
    assert load_config(seed).config.ckpt.save_ckpt_folder == "boto3:s3://model_weights.10.0.0.1:9000/internlm"
    check_config(load_config(seed), 16)
    monkeypatch.delenv("BOTO3_IP")
    with pytest.raises(ConfigError, match=r"seed_20b_boto3\.py:18: the environment variable BOTO3_IP is not set"):
        load_config(seed)
    assert load_config(seed, ["BOTO3_IP=h", "SAVE_CKPT_FOLDER=local:here"]).config.ckpt.save_ckpt_folder == "local:here"


def test_20b_config_equals_seed() -> None:
    ours = load_config(ROOT / "configs" / "20B_sft.py")
    assert ours.config == load_config(SEED).config
    written = {key for key, origin in load_config(SEED).origins.items() if origin != "default"}
    assert written == {key for key, origin in ours.origins.items() if origin != "default"}


@pytest.mark.parametrize(("name", "world", "mlp"), [("20B_sft", 16, 13824), ("7B_sft", 8, 11008), ("tiny", 1, 192)])
def test_shipped_configs_load(name: str, world: int, mlp: int) -> None:
    loaded = load_config(ROOT / "configs" / f"{name}.py")
    check_config(loaded, world)
    assert loaded.config.model.mlp_hidden_size == mlp and loaded.notes == ()


@pytest.mark.parametrize("name", ["20B_sft", "7B_sft"])
def test_shipped_configs_check_world_size(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a (multiple|divisor)"):
        check_config(load_config(ROOT / "configs" / f"{name}.py"), 6)


def test_modules_functions_and_private_names_are_ignored(tmp_path: Path) -> None:
    text = "import os\nfrom math import sqrt\ndef f(): pass\nclass C: pass\n_x = 3\nNAME = {'a': sqrt(4)}\n'doc'\n"
    assert load(tmp_path, text).config.JOB_NAME == "tiny"


# Overrides


def test_variable_override_reaches_derived_values() -> None:
    loaded = load_config(SEED, ["HIDDEN_SIZE=4096", "CHECKPOINT_EVERY=10", "SAVE_CKPT_FOLDER=local:elsewhere"])
    assert loaded.config.model.hidden_size == 4096
    assert loaded.config.ckpt.oss_snapshot_freq == 5
    assert loaded.config.ckpt.snapshot_ckpt_folder == "local:elsewhere/snapshot"
    assert loaded.origins["model.hidden_size"].endswith("seed_20b.py:120")


def test_variable_override_of_unusual_assignments(tmp_path: Path) -> None:
    text = "A, B = 1, 2\nC: int = 3\nD = 4\nD += 1\nif True:\n    E = F = 5\nseed = A + B + C + D + E + F\n"
    assert load(tmp_path, text).config.seed == 1 + 2 + 3 + 5 + 5 + 5
    names = ["A=10", "B=20", "C=30", "D=40", "E=50", "F=60"]
    assert load(tmp_path, text, *names).config.seed == 210


def test_variable_override_reaches_the_base(tmp_path: Path) -> None:
    assert load(tmp_path, "", "SEQ_LEN=64").config.data.seq_len == 64


def test_override_of_failing_variable(tmp_path: Path) -> None:
    text = "import os\nSEED = int(os.environ['NO_SUCH_VARIABLE'])\nseed = SEED\n"
    assert load(tmp_path, text, "SEED=5").config.seed == 5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("adam.lr=3e-4", "lr", 3e-4),
        ("adam.weight_decay=0", "weight_decay", 0),
        ("adam.weight_decay_on=all", "weight_decay_on", "all"),
    ],
)
def test_key_override(override: str, key: str, value: object) -> None:
    loaded = load_config(SEED, [override])
    assert getattr(loaded.config.adam, key) == value
    assert loaded.origins[f"adam.{key}"] == "command line"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("dict(code=2, docs=1)", {"code": 2, "docs": 1}),
        (" {'code': dict(x=[dict()])} ", {"code": {"x": [{}]}}),
        ("dict(code=2**16, docs=2 * 3)", {"code": 65536, "docs": 6}),
        ("dict([('code', 2)])", "dict([('code', 2)])"),
        ("dict(code=f(2))", "dict(code=f(2))"),
        ("dict(**{'code': 2})", "dict(**{'code': 2})"),
    ],
)
def test_override_with_dict(written: str, value: object) -> None:
    assert parse_overrides([f"data.weights={written}"]).layer.get("data.weights") == value


def test_more_key_overrides() -> None:
    config = load_config(
        SEED,
        [
            "cudnn_benchmark=True",
            "seed=3",
            "JOB_NAME=7",
            "data.skip_batches=7",
            "data.train_folder=/data/a=b",
            "data.weights={'code': 2, 'docs': 1}",
            "parallel.pipeline.size=2",
            "parallel.zero1.size=8",
            "grad_scaler=None",
        ],
    ).config
    assert (config.cudnn_benchmark, config.seed, config.JOB_NAME) == (True, 3, "7")
    assert (config.data.skip_batches, config.data.train_folder) == ("7", "/data/a=b")
    assert config.data.weights == {"code": 2, "docs": 1}
    assert (config.parallel.pipeline.size, config.parallel.zero1, config.grad_scaler) == (2, 8, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("SEQLEN=4", "command line: SEQLEN: the config file has no variable of this name; nearest: SEQ_LEN"),
        ("data.seq_lenn=4", "command line: data.seq_lenn: unknown key; nearest known key: data.seq_len"),
        ("adam.lr=fast", "command line: adam.lr: found 'fast', expected a number >= 0 and <= 3e+38"),
        ("data.seq_len.x=1", "command line: data.seq_len: found {'x': 1}, expected an integer > 0"),
        ("cudnn_benchmark=true", "command line: cudnn_benchmark: found 'true', expected True or False; write True"),
        ("data.seq_len", "command line: found 'data.seq_len', expected NAME=value or section.key=value"),
        ("--x=3", "command line: found '--x=3', expected NAME=value or section.key=value"),
    ],
)
def test_wrong_override(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SEED, [override])
    assert str(error.value).startswith(expected)


# Inheritance


def test_base_merges_and_delete_replaces(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"_base_ = {str(TINY)!r}\ndata = dict(train_folder='t', weights=dict(x=1, y=2))\n")
    (tmp_path / "b.py").write_text("data = dict(micro_num=8)\nadam = dict(lr=2e-3)\n")
    text = "_base_ = ['a.py', 'b.py']\ndata = dict(weights={'z': 3, '_delete_': True})\n"
    (tmp_path / "c.py").write_text(text)
    loaded = load_config(tmp_path / "c.py")
    assert [file.name for file in loaded.files] == ["c.py", "b.py", "a.py", "tiny.py"]
    assert loaded.config.data.weights == {"z": 3} and loaded.config.data.micro_num == 8
    assert loaded.config.adam.lr == 2e-3 and loaded.config.data.seq_len == 128
    assert loaded.origins["adam.lr"].endswith("b.py:2") and loaded.origins["data.weights"].endswith("c.py:2")
    assert loaded.origins["data.micro_bsz"].endswith("tiny.py:17")
    text = text.replace("'_delete_': True", "")
    (tmp_path / "c.py").write_text(text)
    assert load_config(tmp_path / "c.py").config.data.weights == {"x": 1, "y": 2, "z": 3}


def test_variable_replaces_that_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        f"_base_ = {str(TINY)!r}\nLR = 1e-3\nN: int = 1\nA, B = 1, 2\nB += 1\n"
        "adam = dict(lr=LR)\ndata = dict(micro_num=N, micro_bsz=B)\n"
    )
    text = "_base_ = 'b.py'\nTOTAL_STEPS = 30 * 2\nLR = 2e-3\nN = len('abc')\nB = 7\nOTHER = open\nJOB_NAME = 'top'\n"
    (tmp_path / "a.py").write_text(text)
    loaded = load_config(tmp_path / "a.py")
    config = loaded.config
    assert loaded.notes[0].endswith("b.py: B, LR, N replaced by the value of the file above it")
    assert (config.data.total_steps, config.lr_scheduler.total_steps, config.JOB_NAME) == (60, 60, "top")
    assert (config.adam.lr, config.data.micro_num, config.data.micro_bsz) == (2e-3, 3, 7)
    config = load_config(tmp_path / "a.py", ["LR=4e-3", "SEQ_LEN=64"]).config
    assert (config.adam.lr, config.data.seq_len, config.data.total_steps) == (4e-3, 64, 60)


def test_circular_base(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("_base_ = 'b.py'\n")
    (tmp_path / "b.py").write_text("_base_ = 'a.py'\n")
    with pytest.raises(ConfigError, match=r"_base_ runs in a circle: a\.py -> b\.py -> a\.py"):
        load_config(tmp_path / "a.py")


def test_error_in_base(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("\nx = NOTHING\n")
    (tmp_path / "a.py").write_text("_base_ = 'b.py'\n")
    with pytest.raises(ConfigError, match=r"b\.py:2: .*NameError: name 'NOTHING' is not defined"):
        load_config(tmp_path / "a.py")


# Origins and defaults


def test_origins(tmp_path: Path) -> None:
    text = (
        "COMMON = dict(\n    lr=1e-3,\n    adam_beta1=0.8,\n)\n"  # lines 2-5
        "adam = dict(\n    **COMMON,\n    adam_beta2=0.9,\n)\n"  # 6-9
        "data = {\n    'micro_num': 3,\n}\n"  # 10-12
        "data['min_length'] = 5\ndata.update(\n    valid_every=3,\n)\n"  # 13-16
        "loss = (lambda: dict(label_smoothing=0.1))()\n"  # 17
        "ckpt = dict(load_optimizer=True) | dict(\n    checkpoint_every=7)\n"  # 18-19
    )
    origins = load(tmp_path, text).origins
    lines = {key: int(origin.rpartition(":")[2]) for key, origin in origins.items() if "x.py" in origin}
    assert lines == {
        "adam.lr": 3,
        "adam.adam_beta1": 4,
        "adam.adam_beta2": 8,
        "data.micro_num": 11,
        "data.min_length": 13,
        "data.valid_every": 15,
        "loss.label_smoothing": 17,
        "ckpt.load_optimizer": 18,
        "ckpt.checkpoint_every": 19,
    }
    assert origins["seed"] == "default"


def test_defaults_taken_from_other_keys(tmp_path: Path) -> None:
    text = "lr_scheduler = dict(warmup_ratio=0.2, _delete_=True)\nadam = dict(adam_beta2=0.99)\n"
    text += "ckpt = dict(save_ckpt_folder='s/')\n"
    loaded = load(tmp_path, text)
    assert loaded.config.lr_scheduler.total_steps == 20
    assert loaded.config.beta2_scheduler.init_beta2 == 0.99
    assert loaded.config.ckpt.snapshot_ckpt_folder == "s/snapshot"
    assert loaded.origins["lr_scheduler.total_steps"] == "default (data.total_steps)"
    assert loaded.notes == ()


def test_contradicting_values_are_noted() -> None:
    loaded = load_config(SEED, ["data.total_steps=20", "adam.adam_beta2=0.99"])
    check_config(loaded, 16)
    assert [note.partition(": ")[2] for note in loaded.notes] == [
        "lr_scheduler.total_steps=50000 differs from data.total_steps=20 (command line): "
        "the learning rate reaches eta_min at another step than the last",
        "beta2_scheduler.init_beta2=0.95 differs from adam.adam_beta2=0.99 (command line): the schedule decides",
    ]


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (
            ["parallel.zero1=1", "parallel.zero_stage=3"],
            "parallel.zero1=1 with parallel.zero_stage=3: nothing is shared",
        ),
        (["parallel.reshard_after_forward=False"], "False with parallel.zero_stage=1: without effect"),
        (["model.offload_share=0.5"], 'model.offload_share=0.5 without model.checkpoint="offload": no effect'),
    ],
)
def test_keys_of_the_layout_that_do_nothing_are_noted(given: list[str], note: str) -> None:
    assert [found for found in load_config(SEED, given).notes if note in found]
    assert not [found for found in load_config(SEED, [*given[1:], "parallel.zero1=-1"]).notes if note in found]


# Other spellings


MODEL_ONLY = "load_ckpt_info=dict(path='p', content=('model',), ckpt_type='internevo')"
SPELLINGS = [
    (f"ckpt = dict({MODEL_ONLY})", {"ckpt.load_model_only_folder": "p"}),
    (f"ckpt = dict(load_ckpt_folder='q', {MODEL_ONLY})", {"ckpt.load_ckpt_folder": None}),
    ("ckpt = dict(load_ckpt_info=dict(path='p', content=('all',)))", {"ckpt.load_ckpt_folder": "p"}),
    (
        "ckpt = dict(load_ckpt_folder=dict(path='p', content=['model', 'sampler', 'scheduler']))",
        {"ckpt.load_ckpt_folder": "p", "ckpt.load_optimizer": False},
    ),
    ("ckpt = dict(load_ckpt_info=None)", {"ckpt.load_ckpt_folder": None}),
    ("ckpt = dict(auto_resume=False)", {"ckpt.auto_resume": False}),
    ("ckpt = dict(load_given_ckpt=True)", {"ckpt.auto_resume": False}),
    ("parallel = dict(zero1=dict(size=4, fsdp=False))", {"parallel.zero1": 4}),
    ("parallel = dict(zero1=dict(size=4, fsdp=True))", {"parallel.zero1": 4, "parallel.zero_stage": 3}),
    ("parallel = dict(tensor=dict(size=2, mode='mtp'))", {"parallel.tensor": 2}),
    ("parallel = dict(tensor=dict(size=2, mode='msp'))", {"parallel.sequence_parallel": True}),
    ("parallel = dict(tensor=dict(size=1, mode='isp'))", {"parallel.tensor": 1}),
    ("parallel = dict(pipeline=2)", {"parallel.pipeline.size": 2}),
    ("parallel = dict(pipeline=dict(size=2, mode='1f1b'))", {"parallel.pipeline.size": 2}),
    (
        "parallel = dict(pipeline=dict(size=2, mode='ZBV'))",
        {"parallel.pipeline.size": 2, "parallel.pipeline.schedule": "zbv"},
    ),
    ("parallel = dict(weight=dict(size=1, overlap=True))", {}),
    (
        "hybrid_zero_optimizer = dict(zero_overlap_communication=False)",
        {"hybrid_zero_optimizer.overlap_sync_grad": False},
    ),
    ("use_fp32_norm = True", {"model.use_fp32_norm": True}),
    ("model = dict(add_unit_offset=True)", {"model.zero_centered_norm": True}),
    ("model_type = 'INTERNLM'", {"model.no_bias": False}),
    ("model_type = 'INTERNLM2_PUBLIC'", {"model.no_bias": True}),
    ("model_type = 'LLAMA2'\nmodel = dict(no_bias=False)", {"model.no_bias": False}),
    (
        "ckpt = dict(load_ckpt_info=dict(path=None, content=('model',), ckpt_type='hf'))",
        {"ckpt.load_ckpt_folder": None},
    ),
    ("ckpt = dict(load_ckpt_info=dict(path=''), load_ckpt_folder='q')", {"ckpt.load_ckpt_folder": "q"}),
    (
        f"ckpt = dict(auto_resume=True, load_ckpt_folder='local:q', {MODEL_ONLY})",
        {"ckpt.load_ckpt_folder": None, "ckpt.load_model_only_folder": None},
    ),
    ("data = dict(rampup_batch_size=None)", {"data.rampup_batch_size": ""}),
    ("ckpt = dict(save_ckpt_folder='', load_ckpt_folder='')", {"ckpt.save_ckpt_folder": None}),
    ("loss = None\nmonitor = None", {"loss.label_smoothing": 0}),
    ("parallel = dict(tensor=dict(size=2, sp='none', intern_overlap=False))", {"parallel.sequence_parallel": False}),
    ("parallel = dict(tensor=dict(size=2, sp='flash-attn', memory_pool=True))", {"parallel.sequence_parallel": True}),
    ("parallel = dict(expert=dict(size=-1), sequence_2D=dict(enable=False, head_size=2))", {"parallel.tensor": 1}),
    ("model = dict(num_experts=1, moe_type='GShard', adapt_hf=True, norm_head=False, causal=True)", {}),
    ("model = dict(qkv_bias=True, o_bias=False)", {"model.qkv_bias": True, "model.out_bias": False}),
    ("model_type = 'QWEN2'", {"model.no_bias": True, "model.qkv_bias": True}),
    ("model_type = 'QWEN2'\nmodel = dict(qkv_bias=False)", {"model.qkv_bias": False}),
    ("model = dict(sequence_parallel=False, use_amp=None, use_lora=False, use_fp8='none', lora={})", {}),
    ("data = dict(gradient_accumulation=3, micro_num=3, packed_length=1)", {"data.micro_num": 3}),
    ("model = dict(sequence_parallel=True)", {"parallel.sequence_parallel": True}),
    ("ckpt = dict(checkpoint_every=float('inf'))", {"ckpt.checkpoint_every": None}),
    ("parallel = dict(tensor=dict(size=2, mode='origin_tp'))", {"parallel.tensor": 2}),
    ("model_type = 'INTERNLM3'", {"model.no_bias": True}),
    ("alert_address = None", {"monitor.alerts.webhook": None}),
    ("alert_address = 'https://x.example/a'", {"monitor.alerts.format": "feishu"}),
    ("data = dict(num_worker=4, diag_outlier_ratio=1.1, type='tokenized')", {}),
    ("data = dict(empty_cache_and_diag_interval=10)", {}),
    ("model = dict(qk_interleaved=False, mlp_layer_fusion=True)", {}),
    ("metric_dtype = 'fp32'\ngeneration = dict(top_k=5)", {}),
    ("monitor = dict(alert=dict(enable_feishu_alert=False, feishu_alert_address=None))", {}),
    ("monitor = dict(tensorboard=dict(queue_max_length=1))", {"monitor.tensorboard": None}),
    (
        "monitor = dict(alert=dict(enable_feishu_alert=True, feishu_alert_address='https://x.example/a'))",
        {"monitor.alerts.webhook": "https://x.example/a", "monitor.alerts.format": "feishu"},
    ),
    (
        "monitor = dict(alert=dict(enable_feishu_alert=False, feishu_alert_address='https://x.example/a'))",
        {"monitor.alerts.webhook": None},
    ),
]


@pytest.mark.parametrize(("text", "expected"), SPELLINGS, ids=[text for text, _ in SPELLINGS])
def test_aliases(tmp_path: Path, text: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, text + "\n")
    for key, value in expected.items():
        found: object = loaded.config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key
    assert loaded.notes and all("x.py:" in note and "understood" in note for note in loaded.notes)


def test_keys_without_effect_share_a_note(tmp_path: Path) -> None:
    """The keys that InternEvo's newest dense configs have beside ours, with the values those files have."""
    text = (
        "ckpt = dict(enable_save_ckpt=False, enable_internevo2hf_ckpt=False)\ndata = dict(use_shm=False)\n"
        "hybrid_zero_optimizer = dict(use_split_tensor_optim=False, all_gather_size=2**29)\n"
        "parallel = dict(pipeline=dict(size=1, zero_bubble=False), weight=dict(size=1, overlap=True))\n"
        "model = dict(enable_qkv_fusion=True, sequence_parallel=False, use_amp=False, num_experts=1)\n"
        "loss = dict(label_smoothing=0, op_type='py_vocab_parallel')\nadam = dict(lr=1e-4, foreach=False)\n"
        "use_apex_adam = False\nenable_tb = True\n"
    )
    loaded = load(tmp_path, text)
    (note,) = (note for note in loaded.notes if "without effect" in note)
    assert note.partition("x.py:2: ")[2].count(", ") == 14 and "data.use_shm" in note
    assert loaded.config.adam.lr == 1e-4 and loaded.config.parallel.pipeline.size == 1


def test_eta_min_above_lr_is_a_note(tmp_path: Path) -> None:
    (note,) = load(tmp_path, "adam = dict(lr=2e-6)\nlr_scheduler = dict(eta_min=1e-5)\n").notes
    assert "x.py:3: lr_scheduler.eta_min=1e-05 is above adam.lr=2e-06" in note


def test_saving_that_is_not_switched_on_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(TINY.read_text().replace("ckpt = dict(enable_save_ckpt=False)", ""))
    loaded = load_config(tmp_path / "x.py", ["ckpt.save_ckpt_folder=local:s", "ckpt.checkpoint_every=5"])
    assert loaded.notes == ("command line: nothing is saved: ckpt.enable_save_ckpt is False unless it is written",)


@pytest.mark.parametrize(
    ("stages", "note"),
    [
        ("[dict(until=8), dict()]", None),
        ("[dict(until=8), dict(until=10)]", None),
        (
            "[dict(until=8), dict(until=12)]",
            "stages[1].until=12, but the run ends at data.total_steps=10: the",
        ),
        ("[dict(until=10), dict(lr=1e-4)]", "stages[0].until=10, but the run ends at data.total_steps=10: no"),
        ("[dict(until=12), dict(until=20), dict()]", "stages[0].until=12, but the run ends at data.total_steps"),
    ],
)
def test_a_note_tells_of_stages_that_are_not_reached(stages: str, note: str | None) -> None:
    notes = load_config(TINY, ["data.total_steps=10", "lr_scheduler.total_steps=10", f"stages={stages}"]).notes
    assert len(notes) == (note is not None)
    assert all(f"command line: {note}" in found for found in notes)


def test_given_weights_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    assert load(tmp_path, f"ckpt = dict(auto_resume=True, {MODEL_ONLY})\n").config.ckpt.load_model_only_folder == "p"


MODEL_OF_Q = "ckpt = dict(load_ckpt_info=dict(path='q', content=('model',), ckpt_type='internlm'))\n"
ALL_OF_Q = "ckpt = dict(load_ckpt_info=dict(path='q', content=('all',)))\n"


@pytest.mark.parametrize(
    ("text", "overrides", "whole", "model_only"),
    [
        (MODEL_OF_Q, ["ckpt.load_ckpt_info=None"], None, None),
        (ALL_OF_Q, ["ckpt.load_ckpt_info=None"], None, None),
        ("ckpt = dict(load_model_only_folder='q')", ["ckpt.load_ckpt_info=None"], None, None),
        (MODEL_OF_Q, ["ckpt.load_ckpt_info=None", "ckpt.load_ckpt_folder=p"], "p", None),
        (MODEL_OF_Q, ["ckpt.load_ckpt_info.path=p"], None, "p"),
        (ALL_OF_Q, ["ckpt.load_ckpt_info.path=p"], "p", None),
        (MODEL_OF_Q, ["ckpt.load_ckpt_info.content=('all',)"], "q", None),
        (MODEL_OF_Q, ["ckpt.load_ckpt_info={'path': 'p', 'content': ('all',)}"], "p", None),
        (ALL_OF_Q, ["ckpt.load_ckpt_info=dict(path='p', content=('model',))"], None, "p"),
        (MODEL_OF_Q, ["ckpt.load_ckpt_info=dict(path='p', _delete_=True)"], "p", None),
        ("ckpt = dict(load_model_only_folder='o', load_ckpt_info=dict(path='q'))", [], "q", None),
    ],
)
def test_load_alias_in_override(
    tmp_path: Path, text: str, overrides: list[str], whole: str | None, model_only: str | None
) -> None:
    ckpt = load(tmp_path, text, *overrides).config.ckpt
    assert (ckpt.load_ckpt_folder, ckpt.load_model_only_folder, ckpt.load_optimizer) == (whole, model_only, True)


def test_load_alias_over_base(tmp_path: Path) -> None:
    load(tmp_path, "ckpt = dict(load_ckpt_info=dict(path='q', content=['model', 'sampler', 'scheduler']))\n")
    (tmp_path / "y.py").write_text("_base_ = 'x.py'\nckpt = dict(load_ckpt_info=dict(path='p'))\n")
    loaded = load_config(tmp_path / "y.py")
    assert (loaded.config.ckpt.load_ckpt_folder, loaded.config.ckpt.load_optimizer) == ("p", False)
    (tmp_path / "y.py").write_text("_base_ = 'x.py'\nckpt = dict(load_ckpt_info=None)\n")
    loaded = load_config(tmp_path / "y.py")
    assert loaded.config.ckpt.load_ckpt_folder is None and "y.py:2" in loaded.origins["ckpt.load_ckpt_folder"]
    assert (
        "ckpt.load_ckpt_info=None understood as ckpt.load_model_only_folder=None, ckpt.load_ckpt_f" in loaded.notes[-1]
    )


@pytest.mark.parametrize("alert", ["feishu_alert_address='{}'", "enable_feishu_alert=False, feishu_alert_address='{}'"])
def test_webhook_is_not_shown(tmp_path: Path, alert: str) -> None:
    loaded = load(tmp_path, f"monitor = dict(alert=dict({alert.format('https://x.example/hush')}))\n")
    shown = [*loaded.notes, *(print_config(loaded, how) for how in ("full", "diff", "origin"))]
    assert "hush" not in "".join(shown)
    alerts = AlertsConfig(webhook="https://x.example/hush", format="slack")
    assert "hush" not in str(masked({"monitor": {"alerts": alerts.model_dump()}}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ckpt = dict(load_ckpt_info=dict(content=('model',)))", "x.py:2: ckpt.load_ckpt_info: found {'content'"),
        ("ckpt = dict(load_ckpt_info='p')", "x.py:2: ckpt.load_ckpt_info: found 'p', expected dict(path=...,"),
        ("parallel = dict(weight=2)", "x.py:2: parallel.weight: found 2, expected size 1"),
        (
            "parallel = dict(tensor=dict(size=2, sp='intern'))",
            "x.py:2: parallel.tensor: found sp='intern': weight parallelism",
        ),
        (
            "model = dict(num_experts=4)\nloss = dict(moe_loss_coeff=0.1)",
            "x.py:2: model.num_experts: found 4: this asks",
        ),
        ("model = dict(adapt_hf=False)", "x.py:2: model.adapt_hf: found False, expected True or no such key; adapt_hf"),
        (
            "model = dict(sequence_parallel=True)\nparallel = dict(sequence_parallel=False)",
            "x.py:2: model.sequence_parallel: found True, but parallel.sequence_parallel is False",
        ),
        ("model_type = 'INTERNLM_MoE'", "only these are built: its blocks have experts"),
        (
            "ckpt = dict(load_ckpt_info=dict(path='p', ckpt_type='hf'))",
            "x.py:2: ckpt.load_ckpt_info: found ckpt_type='hf'; only the checkpoints written here are read; "
            "to make one of a Hugging Face folder: internlm-lite convert from-hf",
        ),
        ("ckpt = dict(load_ckpt_info=dict(path='p', ckpt_type='llama'))", "convert_llama_weights_to_hf"),
        (
            "from mmengine.config import read_base\nwith read_base():\n    from .b.c import *\n    from ..d import x\n",
            "x.py:3: found read_base(); write _base_ = ['b/c.py', '../d.py'] instead of this block",
        ),
        ("from configs.other import *", "No module named 'configs.other'; another config file is read by _base_ ="),
        (
            "parallel = dict(pipeline=dict(mode='zbh1'))",
            "x.py:2: parallel.pipeline.mode: found 'zbh1', expected '1f1b'",
        ),
        ("parallel = dict(tensor=dict(size=2, way=1))", "x.py:2: parallel.tensor: found {'size': 2, 'way': 1}"),
        (
            "model = dict(qk_interleaved=True)",
            "x.py:2: model.qk_interleaved: found True, expected False or no such key",
        ),
        ("data = dict(type='hf')", "x.py:2: data.type: found 'hf', expected 'tokenized' or no such key"),
        ("monitor = dict(alert=dict(enable_feishu_alert=True))", "x.py:2: monitor.alert: found no feishu_alert"),
        ("monitor = dict(alert=dict(light_monitor_address='u'))", "x.py:2: monitor.alert: found light_monitor_address"),
        ("monitor = dict(alert=dict(webhook='u'))", "x.py:2: monitor.alert: unknown key; nearest known key: monitor.a"),
    ],
)
def test_aliases_of_unsupported_features(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text + "\n")


@pytest.mark.parametrize(
    ("key", "value", "feature"),
    [
        ("model.num_local_experts", "8", "a mixture of experts"),
        ("parallel.context_parallel_size", "2", "context parallelism"),
        ("parallel.fsdp", "True", "sharding of weights"),
        ("zero_optimization", "dict(stage=3)", "sharding of weights"),
        ("adam.cpu_offload", "True", "offloading"),
        ("lora", "dict(rank=8)", "LoRA"),
        ("model.kv_lora_rank", "512", "multi-head latent attention"),
        ("use_dpo", "True", "training on preferences"),
        ("model.fp8_recipe", "'delayed'", "another form of FP8"),
        ("load_in_4bit", "True", "quantised training"),
        ("model.vision_tower", "'clip'", "images, video and sound"),
        ("use_cuda_graph", "True", "CUDA graphs"),
        ("model.drop_path_rate", "0.1", "dropout of whole layers"),
        ("model.use_alibi", "True", "other position embeddings"),
        ("deepspeed", "'ds.json'", "DeepSpeed's own settings"),
        ("megatron", "'mg.json'", "another framework's settings"),
    ],
)
def test_features_of_other_frameworks_are_named(tmp_path: Path, key: str, value: str, feature: str) -> None:
    *section, name = key.split(".")
    found = problem(tmp_path, f"{section[0]} = dict({name}={value})\n" if section else f"{name} = {value}\n")
    assert f"x.py:2: {key}: found " in found and f"this asks for {feature}" in found
    assert "not supported; " in found or " name; " in found
    assert load(tmp_path, f"{section[0]} = dict({name}=None)\n" if section else f"{name} = None\n").config


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learning_rate", "adam.lr"),
        ("data.gradient_accumulation_steps", "data.micro_num"),
        ("per_device_train_batch_size", "data.micro_bsz"),
        ("model.num_key_value_heads", "model.num_kv_attention_heads"),
        ("parallel.tensor_model_parallel_size", "parallel.tensor"),
        ("max_grad_norm", "hybrid_zero_optimizer.clip_grad_norm"),
        ("gradient_checkpointing", "model.checkpoint"),
        ("bf16", "model.dtype"),
    ],
)
def test_names_of_other_frameworks_lead_to_ours(tmp_path: Path, key: str, ours: str) -> None:
    assert f"{key}: unknown key; nearest known key: {ours}" in problem(tmp_path, "", f"{key}=7")


def test_tables_of_other_frameworks_name_keys_that_do_not_exist() -> None:
    assert not {*foreign.NO_EFFECT, *foreign.NO_EFFECT_IF} & set(known_keys())
    assert set(foreign.OTHER_NAMES.values()) <= set(known_keys())
    ours = {key.rpartition(".")[2] for key in known_keys()} - {"fp16"}
    assert not [name for name in ours if foreign.missing_feature(name) or name in foreign.OTHER_NAMES]


def test_keys_of_a_section_are_listed_once(tmp_path: Path) -> None:
    found = problem(tmp_path, "data = dict(qqq=1, zzz=2)\n")
    assert found.count("keys of data: seq_len") == 1 and "x.py:2: data.zzz: unknown key" in found


def test_override_of_unsupported_feature(tmp_path: Path) -> None:
    text = "ckpt = dict(load_ckpt_info=dict(path='q', ckpt_type='hf_llama'))\nparallel = dict(weight=2)\n"
    config = load(tmp_path, text, "ckpt.load_ckpt_info=None", "parallel.weight=1").config
    assert config.ckpt.load_ckpt_folder is None
    text = "ckpt = dict(load_ckpt_info=dict(path='q', ckpt_type='hf_llama'))\n"
    assert "found ckpt_type='hf_llama'" in problem(tmp_path, text, "ckpt.load_ckpt_info.path=p")


OTHER_KEYS = ["ckpt.load_ckpt_info", "parallel.weight", "parallel.pipeline.mode", "model_type", "monitor.alert", "x.y"]
VALUES = [
    "None",
    "True",
    "-1",
    "1.5",
    "1e999",
    "''",
    "a",
    "[[]]",
    "{}",
    "{'size': 'x'}",
    "{'path': 'p'}",
    "{1: 2}",
    "b'x'",
]


@given(st.sampled_from([*known_keys(), *OTHER_KEYS]), st.sampled_from(VALUES))
@settings(max_examples=150, deadline=None)
def test_any_value_of_any_key_loads_or_is_a_config_error(key: str, value: str) -> None:
    try:
        loaded = load_config(SEED, [f"{key}={value}"])
        check_config(loaded, 16)
    except ConfigError as error:
        assert str(error).startswith(("command line: ", "tests/config/data/seed_20b.py:", str(SEED)))
    else:
        assert print_config(loaded, "full")


def test_config_cannot_be_changed() -> None:
    config = load_config(SEED).config
    with pytest.raises(ValueError, match="frozen"):
        config.data.seq_len = 1
    assert resolved(config)["data"]["seq_len"] == 2048


def test_the_demo_passes_the_checks_of_a_start() -> None:
    """Its prompts have line breaks, which no other text may have."""
    loaded = load_config(ROOT / "configs/demo.py")
    assert any("\n" in prompt for prompt in loaded.config.monitor.sample_prompts)
    check_config(loaded, 1)
