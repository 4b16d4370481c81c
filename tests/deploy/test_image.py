"""deploy/Dockerfile, by what it copies and installs; building it is for the tests that have a base image."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from agent import __version__
from tests.deploy.copies import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def stages() -> list[str]:
    return re.split(r"(?m)^FROM .*$", DOCKERFILE)[1:]


def installed(stage: str) -> set[str]:
    joined = stage.replace("\\\n", " ")
    return {
        word for line in re.findall(r"apt-get install ([^&\n]*)", joined) for word in line.split() if word[0] != "-"
    }


def test_it_has_the_packages_that_the_set_up_installs() -> None:
    listed = re.search(r'\[run\]="(.*)"', (ROOT / "tests/setup.sh").read_text())
    assert listed
    run, build, last = map(installed, stages())
    assert run == {*listed[1].split(), "python3"}
    assert build == {"python3-venv"}
    assert not last


def test_what_it_copies_is_there_and_in_the_context() -> None:
    sources = [word for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", DOCKERFILE) for word in line.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == kept
    assert all((ROOT / source).exists() for source in sources)


def test_its_label_has_this_version() -> None:
    assert f'image.version="{__version__}"' in DOCKERFILE


def test_bytecode_of_this_machine_stays_out() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in "#!"]
    assert any(fnmatch("agent/policy/__pycache__", pattern) for pattern in patterns if pattern != "*")
