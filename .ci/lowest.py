"""Print the lowest versions that setup.cfg promises, as constraints for pip: `name==version` of `name>=version`."""

import configparser
import re
from pathlib import Path

REQUIREMENT = re.compile(r"([\w.-]+)>=([\w.]+)")


def lowest(setup: str) -> list[str]:
    """The constraints for what `.[test]` of this setup.cfg asks for; any form but `name>=version` is an error."""
    config = configparser.ConfigParser(inline_comment_prefixes="#")
    config.read_string(setup)
    lines = f"{config['options']['install_requires']}\n{config['options.extras_require']['test']}".splitlines()
    found = {}
    for line in filter(None, lines):
        if not (parts := REQUIREMENT.fullmatch(line)):
            raise ValueError(f"setup.cfg asks for {line!r}, expected name>=version: its lowest version is not known.")
        name, found[name] = parts.groups()
    if "jax" in found:
        found["jaxlib"] = found["jax"]  # jax itself would take a newer one
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    print("\n".join(lowest((Path(__file__).parents[1] / "setup.cfg").read_text())))
