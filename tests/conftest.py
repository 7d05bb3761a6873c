"""Every annotation of every public tensor function is checked at run time while the tests run."""

import os

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a defect; the loopback hub lifts this by itself
os.environ["SIGHTLINE_CACHE_BYTES"] = "0"  # the user's cache is left alone
settings.register_profile("change", deadline=None, max_examples=100)  # no deadline: a machine under load is no failure
settings.register_profile("nightly", deadline=None, max_examples=10_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "change"))
# Where tensors have shapes to check; what reads files a thousand names at a time would only be slowed down by it.
ROOMS = ("types", "images", "layers", "tokenizers", "backbones", "heads", "network", "objectives", "evaluation")
ROOMS += ("datasets", "training", "explanation", "inference", "model", "recipes", "reports")
install_import_hook([f"sightline.{room}" for room in ROOMS], "typecheck.check")

import torch  # noqa: E402  (the hook has to stand before anything imports sightline)

torch.set_num_threads(1)  # tests run in parallel processes


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
