from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from loopserve.core.errors import PluginError
from loopserve.core.policy.registry import Kind
from loopserve.plugins import LoadedPlugins, load_registry

Install = Callable[..., None]

GOOD = '''
from loopserve.core.policy.hookspecs import hookimpl
from loopserve.core.policy.interfaces import DecodeCompressor

class Policy(DecodeCompressor):
    """Does nothing."""

    name = "{name}"
    paper = ""

    def init_state(self):
        return None

@hookimpl
def loopserve_register_policies(registry):
    registry.register(Policy)
'''
# Each takes one policy in before it fails, where it gets that far.
HALF_WAY = GOOD.format(name="half_way") + "    raise RuntimeError('half\\n  way')\n"
MISSPELT = GOOD.format(name="misspelt").replace("loopserve_register_policies", "loopserve_register_polices")
UNMARKED = GOOD.format(name="unmarked").replace("@hookimpl\n", "")
FOREIGN = GOOD.format(name="foreign").replace("loopserve_register_policies", "register_policies")
WRONG_ARGUMENT = (
    GOOD.format(name="wrong_argument").replace("(registry)", "(register)", 1).replace("registry.r", "register.r")
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one plugin where Python looks for them; nothing else stands there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LOOPSERVE_DISABLED_PLUGINS", raising=False)
    installed = metadata.entry_points

    def only_ours(**selection: str) -> metadata.EntryPoints:
        return metadata.EntryPoints(
            each for each in installed(**selection) if each.dist is not None and each.dist.name.startswith("test-")
        )

    monkeypatch.setattr(metadata, "entry_points", only_ours)

    def install(
        name: str, source: str, *, distribution: str | None = None, version: str = "1.0", attribute: str = ""
    ) -> None:
        distribution = distribution or f"test-{name}"
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{distribution.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[loopserve]\n{name} = {module}{attribute}\n")

    return install


def reasons(loaded: LoadedPlugins) -> dict[str, str]:
    return {each.name: each.reason for each in loaded.problems}


def test_built_in_policies_come_first_and_need_no_plugin(install: Install):
    loaded = load_registry()
    assert [each.name for each in loaded.plugins] == ["loopserve"]
    assert loaded.registry.get(Kind.PREFILL, "dense").owner.distribution == "loopserve"
    assert loaded.registry.get(Kind.DECODE, "full").owner.distribution == "loopserve"
    assert "prefill.dense" in loaded.plugins[0].policies
    assert not loaded.problems and not loaded.disabled


def test_a_plugin_is_found_through_its_entry_point(install: Install):
    install("good", GOOD.format(name="good"), version="2.3")
    loaded = load_registry(strict=True)
    found = loaded.registry.get(Kind.DECODE, "good")
    assert str(found.owner) == "test-good 2.3"
    assert loaded.plugins[1].policies == ("decode.good",)


def test_a_plugin_may_be_an_object(install: Install):
    module = GOOD.format(name="as_object").replace("@hookimpl", "class Plugin:\n  @hookimpl")
    module = module.replace("def loopserve_register_policies(", "  def loopserve_register_policies(self, ")
    install("plugin", module + "\nplugin = Plugin()\n", attribute=":plugin")
    assert load_registry(strict=True).registry.get(Kind.DECODE, "as_object")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('no\\n  luck')", "ValueError: no luck"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("def broken(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise RuntimeError", "RuntimeError"),
        (HALF_WAY, "RuntimeError: half way"),
        (GOOD.format(name="Bad-Name"), "name must be lower-case words joined by '_', got 'Bad-Name'"),
        (GOOD.format(name="full"), "'full' of test-broken 1.0 "),
        (GOOD.format(name="x").replace('    """Does nothing."""\n', ""), "needs a docstring"),
        (MISSPELT, "unknown hook 'loopserve_register_polices'; did you mean 'loopserve_register_policies'?"),
        (UNMARKED, "loopserve_register_policies is not marked with loopserve.core.policy.hookspecs.hookimpl"),
        (FOREIGN, "unknown hook 'register_policies'"),
        (WRONG_ARGUMENT, "PluginValidationError: "),
        ("x = 3", "it has no hook: define loopserve_register_policies(registry)"),
    ],
    ids=[
        "raises",
        "misses-a-module",
        "no-python",
        "exits",
        "raises-without-words",
        "half-way",
        "bad-name",
        "taken-name",
        "no-docstring",
        "misspelt",
        "unmarked",
        "foreign-hook",
        "wrong-argument",
        "no-hook",
    ],
)
def test_a_broken_plugin_is_named_with_its_reason_and_leaves_nothing(install: Install, source: str, reason: str):
    install("broken", source)
    install("good", GOOD.format(name="good"))
    loaded = load_registry()
    assert reason in reasons(loaded)["broken"] and "\n" not in reasons(loaded)["broken"]
    assert str(loaded.problems[0]).startswith("plugin 'broken' (test-broken 1.0) skipped: ")
    assert {each.owner.distribution for each in loaded.registry} == {"loopserve", "test-good"}
    with pytest.raises(PluginError, match="plugin 'broken'"):
        load_registry(strict=True)


def test_an_entry_point_that_names_nothing_is_a_problem(install: Install, tmp_path: Path):
    install("gone", "")
    for module in tmp_path.glob("*.py"):
        module.unlink()
    assert "ModuleNotFoundError" in reasons(load_registry())["gone"]


def test_a_duplicate_policy_is_refused_naming_both_owners(install: Install):
    install("one", GOOD.format(name="same"))
    install("two", GOOD.format(name="same"), version="2.0")
    loaded = load_registry()
    assert loaded.registry.get(Kind.DECODE, "same").owner.distribution == "test-one"
    assert "of test-two 2.0" in reasons(loaded)["two"] and "test-one 1.0" in reasons(loaded)["two"]


def test_a_duplicate_plugin_name_is_refused_naming_both_owners(install: Install):
    install("same", GOOD.format(name="first"), distribution="test-a")
    install("same", GOOD.format(name="second"), distribution="test-b")
    loaded = load_registry()
    assert loaded.registry.names(Kind.DECODE).count("second") == 0
    assert reasons(loaded)["same"] == "the plugin name 'same' of test-b 1.0 is taken by test-a 1.0"


def test_a_plugin_may_not_pass_for_the_built_in_one(install: Install):
    install("loopserve", GOOD.format(name="impostor"), distribution="test-impostor")
    assert "is taken by loopserve" in reasons(load_registry())["loopserve"]


def test_a_disabled_plugin_is_not_even_imported(install: Install, monkeypatch: pytest.MonkeyPatch):
    install("noisy", "raise AssertionError('imported')")
    install("good", GOOD.format(name="good"))
    monkeypatch.setenv("LOOPSERVE_DISABLED_PLUGINS", " noisy , ")
    loaded = load_registry(strict=True)
    assert loaded.disabled == ("noisy",) and not loaded.problems
    assert "good" in loaded.registry.names(Kind.DECODE)
    assert "noisy" in reasons(load_registry(disabled=["good"]))


def test_disabling_what_is_not_there_is_reported(install: Install):
    install("good", GOOD.format(name="good"))
    loaded = load_registry(disabled=["goood"])
    assert "there is no such plugin; did you mean 'good'?" in reasons(loaded)["goood"]
    assert str(loaded.problems[0]).startswith("plugin 'goood' skipped")
    with pytest.raises(PluginError, match="goood"):
        load_registry(strict=True, disabled=["goood"])


def test_loading_twice_gives_equal_but_separate_registries(install: Install):
    install("good", GOOD.format(name="good"))
    first, second = load_registry().registry, load_registry().registry
    assert first is not second
    assert [each.name for each in first] == [each.name for each in second]


@pytest.mark.parametrize(
    ("distribution", "kind", "name", "paper"),
    [
        ("loopserve-keydiff", Kind.DECODE, "keydiff_bare", "https://arxiv.org/abs/2504.15364"),
        ("loopserve-star", Kind.PREFILL, "star", "https://arxiv.org/abs/2411.17116"),
        ("loopserve-kvpress", Kind.DECODE, "kvpress", "https://arxiv.org/abs/2510.00636"),
    ],
)
def test_a_bundled_plugin_is_found_when_installed(distribution: str, kind: Kind, name: str, paper: str):
    """The test environment installs them: ``pip install -e plugins/...``."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    found = load_registry(strict=True, disabled=[]).registry.get(kind, name)
    assert (found.owner.distribution, found.owner.version) == (distribution, version)
    assert found.paper == paper
