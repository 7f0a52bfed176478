"""Every shipped recipe and launch configuration loads, and the quick ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedllm_sec.grid import grid
from fedllm_sec.train import load
from tests.conftest import ROOT

GRIDS = sorted((ROOT / "recipes" / "grids").glob("*.yaml"))
RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*GRIDS})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_loads(path: Path):
    assert load(path)


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.name)
def test_grid_loads_without_its_data_and_every_cell_has_a_twin(path: Path):
    found = grid.load(path)
    slugs = {cell.slug for cell in found.cells}
    twins = {cell.slug for cell in found.cells if cell.twin is None}
    assert len(found.cells) > len(twins) > 0
    assert {cell.twin for cell in found.cells if cell.twin is not None} <= slugs
    assert all(not c.recipe.enable_attack and not c.recipe.enable_defense for c in found.cells if c.slug in twins)


def test_each_trigger_of_the_durable_grid_that_nobody_learns_has_its_base_rate_asked():
    attacked, clean = (
        yaml.safe_load((ROOT / "recipes" / "grids" / f"{name}.yaml").read_text())
        for name in ("vision_durable", "vision_durable_base")
    )
    assert attacked["base"] == clean["base"]
    assert attacked["axes"]["defense"] == clean["axes"]["defense"]
    planted = [block["data"][0] for block in attacked["axes"]["attack"].values() if block is not None]
    wanted = {d["name"]: {k: v for k, v in d.items() if k != "rate"} for d in planted if d["name"] != "a3fl"}
    asked = [block["attack"]["data"][0] for block in clean["axes"]["trigger"].values()]
    assert {d["name"]: d for d in asked} == wanted


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_launch_configuration_is_one_that_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    known = set(ClusterConfig.__dataclass_fields__)
    assert set(yaml.safe_load(path.read_text())) <= known
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_processes >= 1
