"""What `.ci/run` tries on other versions: the part marked `versions`, and the lowest that setup.cfg promises."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "setup.cfg").read_text()
lowest = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"]
# Where the marked part works with each thing that is installed.
PART = {
    "absl-py": "test_experiments",
    "build": "test_packaging",
    "chex": "test_hypergradient",
    "dm-haiku": "test_interfaces",
    "equinox": "test_interfaces",
    "faster-coco-eval": "test_suppression",
    "flax": "test_students",
    "hypothesis": "test_bad_input",
    "importlib_resources": "test_data",
    "ipykernel": "test_notebook",
    "jax": "test_hypergradient",
    "jaxlib": "test_hypergradient",
    "matplotlib": "test_plots",
    "numpy": "test_released_anchor",
    "optax": "test_released_anchor",
    "orbax-checkpoint": "test_checkpoints",
    "pandas": "test_reading",
    "pillow": "test_data",
    "pytest": "test_versions",
    "pytest-xdist": "test_versions",
    "pyyaml": "test_packaging",
    "rich": "test_progress",
    "sacrebleu": "test_translation",
    "safetensors": "test_pspnet",
    "scikit-learn": "test_data",
    "scipy": "test_compare",
    "sentencepiece": "test_translation",
    "setuptools": "test_packaging",
    "tensorboardX": "test_hooks",
    "tensorflow-datasets": "test_data",
}

pytestmark = pytest.mark.versions


def test_the_part_touches_all_that_is_installed():
    assert {constraint.partition("==")[0] for constraint in lowest(SETUP)} == set(PART)
    unmarked = [name for name in PART.values() if "pytest.mark.versions" not in (ROOT / f"tests/{name}.py").read_text()]
    assert not unmarked


def test_every_requirement_has_its_lowest_version():
    own = SETUP.partition("\nbench =")[0]
    asked = dict(re.findall(r"^\s+([\w-]+)>=(\S+)", own, re.MULTILINE))  # tabs in a source distribution
    assert len(asked) > 15
    asked["jaxlib"] = asked["jax"]
    assert dict(constraint.split("==") for constraint in lowest(SETUP)) == asked


@pytest.mark.parametrize("requirement", ["b", "b~=1.0", "b>=1,<2", "b[extra]>=1"])
def test_a_requirement_without_a_lowest_version_is_an_error(requirement):
    text = "[options]\ninstall_requires =\n    a>=1.2  # why\n    {}\n[options.extras_require]\ntest =\n    c>=3\n"
    assert lowest(text.format("b>=0.1")) == ["a==1.2", "b==0.1", "c==3"]
    with pytest.raises(ValueError, match="expected name>=version"):
        lowest(text.format(requirement))
