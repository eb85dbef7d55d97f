"""Which files go into the wheel; name, version and dependencies are in pyproject.toml.

pip install .            the package and its command `internlm-lite`; .[s3,report] adds extras
pip install -e .[dev]    a checkout to work in, with what the tests need
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

STARTER = ("configs/*.py", "launch/*.sh", "train.py")
"""What `internlm-lite init` writes out: packed as internlm_lite/starter/, kept in git at the top level alone."""


class BuildWithStarter(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the files of the checkout are used
            return
        for file in (file for pattern in STARTER for file in sorted(Path().glob(pattern))):
            target = Path(self.build_lib, "internlm_lite", "starter", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(
    packages=find_packages(include=["internlm_lite", "internlm_lite.*"], exclude=["internlm_lite.apps.bench*"]),
    package_data={
        "internlm_lite.apps.report": ["assets/*", "assets/app/*"],
        "internlm_lite.apps.planner": ["devices/*.json"],
        "internlm_lite.apps.attention_maps": ["maps.html"],
    },
    cmdclass={"build_py": BuildWithStarter},
)
