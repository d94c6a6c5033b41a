import io

from rich.console import Console

from sparsekern.cli.listing import recipe_table, recipe_values
from sparsekern.lab.catalogue import RECIPES


def test_a_line_a_recipe_on_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=80)
    console.print(recipe_table())
    lines = [line for line in console.file.getvalue().splitlines() if line.strip()]
    rows = dict(zip(RECIPES, lines[2:], strict=False))
    assert len(lines) == 2 + len(RECIPES) + 1 and "default" in lines[-1]
    for name, recipe in RECIPES.items():
        assert rows[name].split()[0] == name and rows[name].rstrip().endswith(recipe.source)
    assert rows["resnet20"].split() == ["resnet20", "0.1", "128", "164", "He", "2016,", "section", "4.2"]


def test_the_same_as_values():
    values = recipe_values()
    assert [entry["name"] for entry in values] == list(RECIPES)
    assert values[0]["epochs"] is None and values[1] == {
        "name": "resnet20",
        "title": "ResNet-20",
        "source": "He 2016, section 4.2",
        "rate": 0.1,
        "batch_size": 128,
        "epochs": 164,
        "block_size": 16,
        "distribution": "erk",
        "augmentation": "crop-flip",
    }
