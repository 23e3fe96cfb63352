"""The registry: names, messages, and entry points of other distributions."""

import sys
import textwrap

import pytest

from mergekit_lit.core.registry import Registry, unknown_name

GROUP = "mergekit_lit.test_group"


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Return a function that installs a distribution with one module and one entry point."""

    def install(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        facts = tmp_path / f"{module}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[{GROUP}]\nextra = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def empty() -> Registry:
    return Registry("colour", GROUP)


def test_add_returns_the_function_and_keeps_the_facts():
    colours = empty()

    def red():
        """Be red.

        More text.
        """

    assert colours.add(warm=True)(red) is red
    entry = colours.get("red")
    assert (entry.name, entry.function, entry.facts["warm"]) == ("red", red, True)
    assert entry.summary == "Be red."
    with pytest.raises(TypeError):
        entry.facts["warm"] = False


def test_names_and_iteration_are_sorted():
    colours = empty()

    @colours.add()
    def red():
        """Be red."""

    @colours.add()
    def blue():
        """Be blue."""

    assert colours.names() == ("blue", "red")
    assert [entry.function for entry in colours] == [blue, red]


def test_unknown_name_offers_the_nearest():
    colours = empty()

    @colours.add()
    def orange():
        """Be orange."""

    with pytest.raises(KeyError) as caught:
        colours.get("ornage")
    assert caught.value.args[0] == (
        "No colour named 'ornage'. Did you mean 'orange'? Known: orange."
    )


def test_unknown_name_far_from_all():
    assert unknown_name("colour", "zzz", ["red", "blue"]) == (
        "No colour named 'zzz'. Known: blue, red."
    )


def test_a_taken_name_is_refused():
    colours = empty()

    @colours.add()
    def red():
        """Be red."""

    def elsewhere():
        """Be red too."""

    elsewhere.__name__ = "red"
    elsewhere.__module__ = "another.module"
    with pytest.raises(ValueError, match=r"'red' is taken by .*Rename yours"):
        colours.add()(elsewhere)


def test_entry_points_are_loaded_at_the_first_look_up_only(plug_in):
    colours = empty()
    plug_in("colours_extra", "loads = []\nloads.append(1)")
    assert "colours_extra" not in sys.modules
    assert colours.names() == ()
    assert sys.modules["colours_extra"].loads == [1]
    assert colours.names() == ()


def test_a_plug_in_that_cannot_be_imported_is_named(plug_in):
    plug_in("colours_broken", "import a_package_that_nobody_has")
    with pytest.raises(ValueError, match=r"plug-in 'extra' must be importable.*colours_broken"):
        empty().names()
