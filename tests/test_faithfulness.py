"""Deletion and insertion: curves by hand, and maps that are known to be right or wrong."""

import numpy as np
import pytest
import torch
from torch import nn

from sightline.errors import UserError
from sightline.explanation.explain import explain
from sightline.explanation.faithfulness import Faithfulness, faithfulness, judge
from sightline.explanation.files import judge_maps
from sightline.explanation.render import View
from test_networks import small

WHOLE = View((0, 0, 10, 6), (6, 10), (3.0, 5.0))
"""2 rows and 2 columns of patches of 3×5 pixels."""


class OnePatch(nn.Module):
    """Class 1 rests on the mean of the patch at the upper right, and on nothing else."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels):
        self.seen.append(pixels.clone())
        score = self.scale * pixels[:, :, :3, 5:].mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], dim=1)


def picture() -> torch.Tensor:
    pixels = torch.zeros(3, 6, 10)
    pixels[:, :3, 5:] = 4.0
    return pixels


class TestCurves:
    def test_by_hand(self):
        right = np.array([[0.2, 0.9], [0.1, 0.0]], np.float32)
        found = faithfulness(OnePatch(), picture(), right, WHOLE)
        assert found.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
        before, after = torch.tensor([8.0, 2.0]).sigmoid().tolist()  # 2·4, and 2·(the mean colour, 1)
        assert found.deletion == pytest.approx([before, after, after, after, after], abs=1e-6)
        assert found.deletion_area == pytest.approx((before + 7 * after) / 8, abs=1e-6)
        assert found.insertion[1:] == pytest.approx([before] * 4, abs=1e-6)
        assert found.insertion[0] < before
        assert found.score == found.insertion_area - found.deletion_area > 0
        wrong = faithfulness(OnePatch(), picture(), -right, WHOLE)
        assert wrong.deletion[:3] == pytest.approx([before] * 3, abs=1e-6)
        assert wrong.score < found.score

    def test_what_is_taken_away_is_the_patch_that_was_named(self):
        network = OnePatch()
        faithfulness(network, picture(), np.array([[0.2, 0.9], [0.5, 0.0]], np.float32), WHOLE, steps=2)
        half = network.seen[1][1]  # the deletion: whole, half, none
        assert (half[:, :3, 5:] == 1).all()
        assert (half[:, 3:, :5] == 1).all()
        assert (half[:, :3, :5] == 0).all()
        assert (half[:, 3:, 5:] == 0).all()

    def test_pixels_that_no_cell_sees_stay(self):
        network = OnePatch()
        pixels = torch.randn(3, 7, 12)
        faithfulness(network, pixels, np.ones((2, 2), np.float32), View((0, 0, 12, 7), (7, 12), (3.0, 5.0)))
        gone = network.seen[1][-1]
        assert torch.equal(gone[:, 6:], pixels[:, 6:])
        assert torch.equal(gone[:, :, 10:], pixels[:, :, 10:])
        assert torch.allclose(gone[:, :6, :10], pixels.mean(dim=(1, 2))[:, None, None].expand(3, 6, 10))

    def test_equal_values_come_in_an_order_of_their_own(self):
        flat = np.ones((5, 6), np.float32)
        network, pixels = small("vit", patch_size=8), torch.randn(3, 33, 47)
        view = explain(network, pixels).view(33, 47)
        first, again, other = (faithfulness(network, pixels, flat, view, seed=seed) for seed in (0, 0, 1))
        assert np.array_equal(first.deletion, again.deletion)
        assert not np.array_equal(first.deletion, other.deletion)
        assert first.deletion[0] == other.deletion[0]
        assert first.deletion[-1] == pytest.approx(other.deletion[-1], abs=1e-6)

    def test_target(self):
        found = faithfulness(OnePatch(), picture(), np.ones((2, 2), np.float32), WHOLE, target=0)
        assert found.deletion[0] == pytest.approx(1 - torch.tensor(8.0).sigmoid().item(), abs=1e-6)
        with pytest.raises(UserError, match="no class 2"):
            faithfulness(OnePatch(), picture(), np.ones((2, 2), np.float32), WHOLE, target=2)

    def test_the_network_keeps_its_mode(self):
        network = OnePatch().train()
        faithfulness(network, picture(), np.ones((2, 2), np.float32), WHOLE)
        assert network.training


def test_random_is_the_mean_of_several_orders():
    found = judge(OnePatch(), picture(), {"map": (np.array([[0, 1], [0, 0]], np.float32), WHOLE)})
    assert list(found) == ["map", "random"]
    assert isinstance(found["random"], Faithfulness)
    assert found["map"].deletion_area < found["random"].deletion_area
    assert found["map"].insertion_area > found["random"].insertion_area
    middle = found["random"].deletion[1:-1]
    assert (np.diff(found["random"].deletion) <= 1e-6).all()
    assert len(set(middle.round(5))) > 1  # not one order, but several


@pytest.mark.parametrize("kind", ["vit", "swin", "pit", "resnet"])
def test_every_map_of_an_explanation(kind):
    network, pixels = small(kind), torch.randn(3, 33, 47)
    found = judge_maps(network, pixels, explain(network, pixels, gradients=True))
    expected = {"rollout", "raw", "attention", "relevance"} if kind != "resnet" else set()
    assert set(found) == expected | ({"activation"} if kind in ("swin", "resnet") else set()) | {"random"}
    assert all(0 <= one.deletion_area <= 1 and 0 <= one.insertion_area <= 1 for one in found.values())
    assert len({float(one.deletion[0]) for one in found.values()}) == 1
