"""What an objective needs besides its network and its settings, found or made before a run begins."""

from dataclasses import replace
from typing import Any

from sightline.datasets.split import Splits
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.recipes.recipe import Recipe
from sightline.registry import find
from sightline.schema import from_json
from sightline.training.distributed import World
from sightline.training.run import RunFolder


def made(
    recipe: Recipe, network: Network, splits: Splits, folder: RunFolder, world: World, *, quiet: bool
) -> tuple[Objective, Recipe]:
    """The objective of a recipe for its network, and the recipe with what was found for it.

    Raises UserError for settings that the objective does not have, and where it cannot teach this network.
    """
    kind: type[Objective] = find("objectives", "OBJECTIVES", recipe.objective, "objective")
    config = from_json(kind.Config, recipe.options, recipe.objective)
    given: dict[str, Any] = {}
    return kind(network, config, **given), replace(recipe, options=vars(config))
