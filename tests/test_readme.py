"""What the README shows is so: its snippet runs, and the functions it maps the paper to exist."""

import importlib
import re

from data import HERE

README = (HERE / "README.md").read_text()


def test_the_snippet_runs_as_it_stands():
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 1 and "dscl_loss" in snippets[0] and "pbsd_loss" in snippets[0]
    names = {}
    exec(snippets[0], names)
    assert names["query"].grad.abs().sum() > 0 and names["patch"].grad.abs().sum() > 0


def test_every_function_it_names_exists():
    named = re.findall(r"`(losses|models|data|train|eval)\.([A-Za-z_.]+)`", README)
    named = [(module, name) for module, name in named if name not in ("py",)]
    assert len(named) >= 10
    for module, name in named:
        place = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(place, part), f"README names {module}.{name}"
            place = getattr(place, part)
