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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_launch_configuration_is_one_that_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    known = set(ClusterConfig.__dataclass_fields__)
    assert set(yaml.safe_load(path.read_text())) <= known
    assert ClusterConfig.from_yaml_file(yaml_file=str(path)).num_processes >= 1
