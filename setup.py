"""Package metadata. `pip install -e .` for the core, `pip install -e .[s3,report]` for extras, `.[dev]` for tests."""

from setuptools import find_packages, setup

EXTRAS = {
    "s3": ["boto3>=1.28"],
    "wandb": ["wandb>=0.16"],
    "tb": ["tensorboard>=2.14"],
    "flash": ["flash-attn>=2.5"],
    "deepspeed": ["deepspeed>=0.14"],
    "parquet": ["pyarrow>=14"],
    "hf": ["transformers>=4.40", "tokenizers>=0.15"],
    "report": ["matplotlib>=3.7"],
}
DEV = ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-psutil"]

setup(
    name="internlm_lite",
    version="0.1.0",
    description="Train dense language models in any layout",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["internlm_lite", "internlm_lite.*"]),
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "rich>=13",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "safetensors>=0.4.3",
        "psutil>=5.9",
        "packaging>=23",
    ],
    extras_require={**EXTRAS, "dev": DEV},
)
