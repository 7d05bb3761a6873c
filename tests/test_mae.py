"""The encoder of a masked autoencoder: positions that are carried and never learned."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from sightline.checkpoints.load import load_bundle
from sightline.layers.positions import FixedPositions
from sightline.network import create_model
from sightline.training.average import Average
from sightline.training.optimizer import build
from sightline.training.settings import Settings

GOLDEN = Path(__file__).parent / "data" / "goldens" / "mae"


def test_the_encoder_s_tokens_are_the_original_s() -> None:
    io = load_file(GOLDEN / "io.safetensors")
    bundle = load_bundle(GOLDEN / "checkpoint.pth", num_heads=3)
    with torch.no_grad():
        tokens = bundle.network.backbone(io["input.pixels"])
    theirs = io["output.encoder_all_patches"]
    assert float((tokens.x - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert all(name.startswith(("decoder_", "mask_token")) for name in bundle.coverage.dropped)
    carried = bundle.network.backbone.place.positions
    assert isinstance(carried, FixedPositions)
    assert not carried.table.requires_grad


def test_the_waves_are_the_original_s() -> None:
    carried = load_bundle(GOLDEN / "checkpoint.pth", num_heads=3).network.backbone.place.positions.table
    torch.testing.assert_close(FixedPositions(36, (5, 5), prefix=1).table, carried.detach(), atol=1e-6, rtol=0)


def test_training_leaves_the_positions_alone() -> None:
    little = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    network = create_model("mae_vit_base_patch16_224", 3, **little).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer, average = build(network, network, Settings(lr=0.1, weight_decay=0.1)), Average(network, 0.9)
    for step in range(2):
        network(torch.randn(4, 3, 16, 16)).square().sum().add(network.embed(torch.randn(2, 3, 16, 16)).sum()).backward()
        optimizer.step()
        average.update(network, step)
    table = "backbone.place.positions.table"
    for state in (network.state_dict(), average.network.state_dict()):
        assert torch.equal(state[table], before[table])
        assert not torch.equal(state["backbone.place.class_token"], before["backbone.place.class_token"])
