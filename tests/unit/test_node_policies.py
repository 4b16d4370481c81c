"""The policy directory of a node: real files, real processes. What is wrong changes nothing; what is right is in force."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.controller import Compiled, compiled
from agent.errors import WeirError
from agent.kernel.abi import MAX_POLICIES
from agent.kernel.seam import Version
from agent.node.compiling import Loaded
from agent.node.policies import SETTLED, Directory
from agent.node.policy_files import MAX_FILES, File, decide, look
from agent.node.state import PolicyState
from agent.policy.compile import Tables
from agent.policy.find import load
from agent.policy.model import Prefix, Selector

HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: %s}\n"
BAD = "spec: {default: dny}\n"
PORT = "spec: {egress: [{name: one, action: allow, ports: [%d]}]}\n"
EMPTY = "spec: {}\n"


class Site:
    """A policy directory, and the agent's view of it. Files are named as their policies unless told otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.policies = Directory(path, "base")

    def write(self, name: str, spec: str = EMPTY, file: str = "") -> None:
        (self.path / (file or f"{name}.yaml")).write_text(HEAD % name + spec)

    @property
    def names(self) -> list[str]:
        return [*self.policies.loaded]

    @property
    def counts(self) -> tuple[int, int]:
        reloads = self.policies.reloads
        return reloads.successes_total, reloads.failures_total

    @property
    def failures(self) -> dict[str, str]:
        return dict(self.policies.reloads.failures)

    def rules(self, name: str) -> list[str]:
        return [rule.name for rule in self.policies.loaded[name].compiled.version.rules]

    def ports(self, name: str) -> set[int]:
        """The ports that the policy's only rule is about."""
        clauses = self.policies.loaded[name].compiled.tables.clauses
        return {clause.first_port for clause in clauses if clause.rule == 0}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "policies")
    site.write("base")
    yield site
    site.policies.close()


def test_a_directory_is_read_whole(site: Site) -> None:
    before = time.time()
    site.write("shop", "spec: {mode: audit, selector: {namespaces: [shop]}}\n", file="20.yml")
    site.write("first", PORT % 443, file="10.yaml")
    site.write("hidden", file=".hidden.yaml")
    site.write("note", file="README.md")
    assert site.policies.read()
    assert site.names == ["first", "shop", "base"]
    shop = site.policies.loaded["shop"]
    assert shop.selector == Selector(namespaces=("shop",))
    file = site.path / "20.yml"
    assert shop.compiled == compiled(load(str(file)))
    assert shop.state == PolicyState("shop", str(file), load(str(file)).sha256, "audit")
    assert site.policies.loaded["first"].selector is None
    assert (site.counts, site.failures) == ((1, 0), {})
    assert before <= site.policies.reloads.last_success <= time.time()
    assert not site.policies.read()
    assert site.counts == (1, 0)


def test_resolvers_are_those_given(site: Site) -> None:
    site.write("dns", "spec: {egress: [{name: dns, action: allow, to: [{set: resolvers}]}]}\n")
    policies = Directory(site.path, "base", (Prefix.parse("10.96.0.10"),))
    policies.read()
    assert "10.96.0.10" in {str(entry.prefix) for entry in policies.loaded["dns"].compiled.tables.entries}


def test_a_changed_file_is_in_force_and_a_bad_one_is_not(site: Site) -> None:
    site.write("shop", PORT % 443)
    site.policies.read()
    site.write("shop", PORT % 80)
    assert site.policies.read()
    assert (site.ports("shop"), site.counts) == ({80}, (2, 0))

    site.write("shop", BAD)
    site.write("other", PORT % 25)
    assert site.policies.read()  # the good file next to a bad one is taken
    assert (site.names, site.ports("shop"), site.ports("other")) == (["base", "other", "shop"], {80}, {25})
    assert site.counts == (2, 1)
    assert [*site.failures] == ["shop.yaml"]
    assert f"{site.path}/shop.yaml:4:17: spec.default: 'dny' is not possible here" in site.failures["shop.yaml"]

    assert not site.policies.read()  # and it is one failure, however often one looks
    site.write("other", PORT % 26)
    assert site.policies.read()
    assert (site.counts, [*site.failures]) == ((3, 1), ["shop.yaml"])

    site.write("shop", PORT % 80)
    assert not site.policies.read()  # what was in force all the time
    assert (site.counts, site.failures) == ((4, 1), {})


def test_another_mistake_in_a_bad_file_is_another_failure(site: Site) -> None:
    site.write("shop", BAD)
    site.policies.read()
    site.write("shop", "spec: {}\nx: y\n")
    assert not site.policies.read()
    assert (site.names, site.counts) == (["base"], (0, 2))
    assert "there is no such key" in site.failures["shop.yaml"]


def test_a_removed_file_takes_its_policy_with_it(site: Site) -> None:
    site.write("shop")
    site.write("bad", BAD)
    site.policies.read()
    (site.path / "shop.yaml").unlink()
    (site.path / "bad.yaml").unlink()
    assert site.policies.read()
    assert (site.names, site.counts, site.failures) == (["base"], (1, 1), {})


def test_a_renamed_file_is_the_same_policy_in_another_place(site: Site) -> None:
    site.write("shop")
    site.policies.read()
    (site.path / "shop.yaml").rename(site.path / "00.yaml")
    assert site.policies.read()
    assert (site.names, site.failures) == (["shop", "base"], {})


def test_touching_is_no_reload(site: Site) -> None:
    site.policies.read()
    loaded = site.policies.loaded["base"]
    os.utime(site.path / "base.yaml")
    (task,) = site.policies._tasks(look(site.path))
    assert task.known == loaded.state.sha256  # so that nothing is compiled either
    shutil.copy(site.path / "base.yaml", site.path / "copy")
    (site.path / "copy").rename(site.path / "base.yaml")
    assert not site.policies.read()
    assert site.policies.loaded["base"] is loaded
    assert site.counts == (1, 0)


def test_a_comment_is_a_reload_of_the_same_tables(site: Site) -> None:
    """So that `{set: resolvers}` can be renewed, and the digest shown is that of the file."""
    site.policies.read()
    old = site.policies.loaded["base"]
    site.write("base", EMPTY + "# looked at\n")
    assert site.policies.read()
    new = site.policies.loaded["base"]
    assert new.compiled == old.compiled
    assert new.state.sha256 != old.state.sha256


@pytest.mark.parametrize("how", ["emptied", "removed", "a file in its place", "too full"])
def test_a_directory_that_is_of_no_use_changes_nothing(site: Site, how: str) -> None:
    site.write("shop")
    site.write("bad", BAD)
    site.policies.read()
    before = dict(site.policies.loaded)
    away = site.path.with_name("away")
    site.path.rename(away)
    if how in ("emptied", "too full"):
        site.path.mkdir()
        site.write("hidden", file=".hidden.yaml")
    if how == "too full":
        for number in range(MAX_FILES + 1):
            site.write("base", file=f"{number}.yaml")
    if how == "a file in its place":
        site.path.touch()
    assert not site.policies.read()
    assert not site.policies.read()
    assert (site.policies.loaded, site.counts) == (before, (0, 2))
    assert [*site.failures] == ["bad.yaml", str(site.path)]
    reason = {"emptied": "there is no policy in", "too full": f"there are {MAX_FILES + 1} policies in"}
    assert site.failures[str(site.path)].startswith(reason.get(how, "the policy directory"))

    if how == "a file in its place":
        site.path.unlink()
    if site.path.exists():
        shutil.rmtree(site.path)
    away.rename(site.path)
    assert not site.policies.read()
    assert (site.policies.loaded, [*site.failures], site.counts) == (before, ["bad.yaml"], (1, 2))


def test_there_are_as_many_files_as_the_kernel_holds_policies() -> None:
    assert MAX_FILES == MAX_POLICIES


def test_two_files_of_one_name_change_nothing_and_name_each_other(site: Site) -> None:
    site.write("shop", PORT % 443, file="a.yaml")
    site.write("blog", PORT % 80, file="b.yaml")
    site.policies.read()
    site.write("shop", PORT % 25, file="b.yaml")
    site.write("shop", PORT % 26, file="c.yaml")
    site.write("shop", PORT % 27, file="a.yaml")
    assert not site.policies.read()
    assert (site.names, site.ports("shop"), site.ports("blog")) == (["shop", "blog", "base"], {443}, {80})
    assert site.counts == (1, 1)
    assert {name: re.findall(r"[abc]\.yaml", text) for name, text in site.failures.items()} == {
        "a.yaml": ["b.yaml", "c.yaml"], "b.yaml": ["a.yaml", "c.yaml"], "c.yaml": ["a.yaml", "b.yaml"],
    }  # fmt: skip
    (site.path / "c.yaml").unlink()
    site.write("blog", PORT % 81, file="b.yaml")
    assert site.policies.read()
    assert (site.ports("shop"), site.ports("blog"), site.failures) == ({27}, {81}, {})


def test_the_default_may_be_a_shipped_one(site: Site) -> None:
    policies = Directory(site.path, "untrusted")
    policies.read()
    assert [*policies.loaded] == ["base", "untrusted"]
    assert policies.loaded["untrusted"].compiled == compiled(load("untrusted"))
    assert policies.reloads.failures == {}


def test_the_directorys_own_comes_before_a_shipped_one(site: Site) -> None:
    site.write("untrusted", PORT % 99)
    policies = Directory(site.path, "untrusted")
    policies.read()
    assert policies.loaded["untrusted"].state.file == str(site.path / "untrusted.yaml")
    (site.path / "untrusted.yaml").unlink()
    assert not policies.read()
    assert policies.loaded["untrusted"].state.file == str(site.path / "untrusted.yaml")  # not the shipped one
    assert [*policies.reloads.failures] == ["untrusted.yaml"]


@pytest.mark.parametrize("default", ["nosuch", "../x", "base.yaml", ""])
def test_there_has_to_be_a_default(site: Site, default: str) -> None:
    with pytest.raises(WeirError, match="there is no default policy") as caught:
        Directory(site.path, default).read()
    assert "The shipped ones are appengine" in caught.value.message


def test_without_a_directory_there_is_the_shipped_default(tmp_path: Path) -> None:
    policies = Directory(tmp_path / "nowhere", "appengine")
    assert policies.read()
    assert [*policies.loaded] == ["appengine"]
    assert "cannot be read: No such file" in policies.reloads.failures[str(tmp_path / "nowhere")]


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_default_that_vanishes_stays_in_force(site: Site, how: str) -> None:
    site.write("shop")
    site.write("base", PORT % 7)
    site.policies.read()
    if how == "removed":
        (site.path / "base.yaml").unlink()
    else:
        site.write("other", file="base.yaml")
    site.policies.read()
    assert site.names == (["shop", "base"] if how == "removed" else ["other", "shop", "base"])
    assert site.ports("base") == {7}
    assert "its last good version stays in force" in site.failures["base.yaml"]
    site.write("shop", PORT % 8)
    assert site.policies.read()
    assert site.ports("base") == {7}
    site.write("base", PORT % 9)
    assert site.policies.read()
    assert (site.names, site.ports("base"), site.failures) == (["base", "shop"], {9}, {})


class ConfigMap:
    """A directory as the kubelet keeps a ConfigMap's: links to ..data, which leads to a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def put(self, files: dict[str, str]) -> None:
        data = self.path / "..data"
        old = data.resolve() if data.exists() else None
        self._count += 1
        new = self.path / f"..2026_11_21.{self._count}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
        (self.path / "..data_tmp").symlink_to(new.name)
        (self.path / "..data_tmp").rename(data)
        for name in files:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        for link in self.path.iterdir():
            if not link.name.startswith("..") and link.name not in files:
                link.unlink()
        if old:
            shutil.rmtree(old)


def test_a_config_map_is_swapped_as_a_whole(tmp_path: Path) -> None:
    configured = ConfigMap(tmp_path)
    base = HEAD % "base" + EMPTY
    configured.put({"base.yaml": base, "shop.yaml": HEAD % "shop" + PORT % 1})
    policies = Directory(tmp_path, "base")
    policies.read()
    assert [*policies.loaded] == ["base", "shop"]
    kept = policies.loaded["base"]

    configured.put({"base.yaml": base, "shop.yaml": HEAD % "shop" + PORT % 2})
    assert policies.read()
    assert policies.loaded["base"] is kept  # another file, the same bytes
    assert 2 in {clause.first_port for clause in policies.loaded["shop"].compiled.tables.clauses}

    configured.put({"base.yaml": base, "blog.yaml": HEAD % "blog" + EMPTY})
    assert policies.read()
    assert ([*policies.loaded], policies.reloads.failures) == (["base", "blog"], {})

    configured.put({})
    assert not policies.read()
    assert [*policies.loaded] == ["base", "blog"]
    assert "there is no policy in" in policies.reloads.failures[str(tmp_path)]


def test_a_file_is_not_read_while_it_is_being_written(site: Site) -> None:
    """Each half of it alone is a policy, so that reading it too early would show."""
    site.write("shop", PORT % 1)
    site.policies.read()
    seen, in_time = set(), True
    with (site.path / "shop.yaml").open("w") as file:
        for piece in (
            HEAD % "shop",
            "spec:\n  egress:\n",
            *(f"  - {{name: r{n}, action: allow, ports: [{n + 1}]}}\n" for n in range(40)),
        ):
            started = time.monotonic()
            file.write(piece)
            file.flush()
            site.policies.refresh()
            seen.add(len(site.rules("shop")))
            in_time &= time.monotonic() - started < SETTLED / 2
            assert site.policies.busy
            assert site.policies._compiling is None or not in_time
            time.sleep(0.02)
    assert seen == {1}
    assert site.policies.read()
    assert (len(site.rules("shop")), site.counts) == (40, (2, 0))


def test_what_changes_while_it_is_compiled_is_compiled_again(site: Site) -> None:
    """Two files that belong together, the second written when the first is on its way: one never goes without the other."""
    site.write("one", PORT % 1)
    site.write("two", PORT % 1)
    site.policies.read()
    site.write("one", PORT % 2)
    while site.policies._compiling is None:
        site.policies.refresh()
    site.write("two", PORT % 2)
    steps = set()
    while site.policies.busy:
        site.policies.refresh()
        steps.add((*site.ports("one"), *site.ports("two")))
    assert steps == {(1, 1), (2, 2)}
    assert site.counts == (2, 0)


def test_a_directory_that_never_rests_is_read_after_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.node.policies.PATIENCE", 0.5)
    site.policies.read()
    site.write("shop", PORT % 1)
    limit = time.monotonic() + 60
    while "shop" not in site.names and time.monotonic() < limit:
        (site.path / ".scratch").touch()
        (site.path / ".scratch").unlink()
        site.policies.refresh()
    assert "shop" in site.names


def test_a_file_that_is_left_half_written_is_a_failure_until_it_is_whole(site: Site) -> None:
    whole = HEAD % "shop" + PORT % 5
    (site.path / "shop.yaml").write_text(whole[:-4])
    site.policies.read()
    assert (site.names, site.counts) == (["base"], (0, 1))
    (site.path / "shop.yaml").write_text(whole)
    assert site.policies.read()
    assert (site.ports("shop"), site.counts, site.failures) == ({5}, (1, 1), {})


def test_refresh_does_not_wait(site: Site) -> None:
    site.policies.read()
    site.write("shop")
    assert not site.policies.refresh()
    steps = 0
    while site.policies.busy and not site.policies.refresh():
        steps += 1
    assert steps > 20  # it came back that often before the process had its answer
    assert site.names == ["base", "shop"]


def test_two_hundred_policies(site: Site) -> None:
    text = Path(load("appengine").source).read_text()
    for number in range(200):
        (site.path / f"{number:03}.yaml").write_text(text.replace("name: appengine", f"name: p{number}"))
    assert site.policies.read()
    assert site.names == [*(f"p{number}" for number in range(200)), "base"]
    assert len(site.policies.loaded["p199"].compiled.tables.entries) > 400
    loaded = dict(site.policies.loaded)
    (site.path / "100.yaml").unlink()
    assert site.policies.read()
    assert all(site.policies.loaded[name] is loaded[name] for name in site.names)
    assert site.names == [name for name in loaded if name != "p100"]


def test_the_agent_never_holds_yaml_or_pydantic() -> None:
    code = "import sys, agent.node.policies, agent.node.choose; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "agent.controller" in names
    assert not [name for name in names if name.startswith(("pydantic", "yaml"))]
    assert not {"agent.policy.parse", "agent.policy.document", "agent.policy.find"} & {*names}


def version(name: str) -> Loaded:
    tables = Tables((), ())
    return Loaded(Compiled(Version(name, b"", 0, ()), tables), None, PolicyState(name, "", "", "enforce"))  # type: ignore[arg-type]


names = st.sampled_from("xyz")
changes = st.lists(st.dictionaries(st.sampled_from("abcd"), st.none() | names, max_size=4), max_size=6)


@given(changes)
def test_versions_in_force_always_have_different_names(history: list[dict[str, str | None]]) -> None:
    """A history of the directory: each step says what is in each file that there is; None is a broken one."""
    files: dict[str, File] = {}
    for step in history:
        found = {}
        for name, policy in sorted(step.items()):
            file = files.get(name, File((), wrong="new"))
            present = version(policy) if policy else None
            found[name] = replace(file, present=present, wrong="" if present else "broken")
        before = {name: file.good for name, file in found.items()}
        files, problems = decide(found)
        goods = [file.good.state.name for file in files.values() if file.good]
        assert len(goods) == len(set(goods))
        for name, file in files.items():
            unique = [step[other] for other in step].count(step[name]) == 1
            assert file.good is (before[name] if name in problems else file.present)
            if file.present is None:
                assert problems[name] == "broken"
            elif not unique:
                assert all(other in problems[name] for other in step if other != name and step[other] == step[name])
            elif all(old is None or old.state.name != step[name] for key, old in before.items() if key != name):
                assert name not in problems
