"""`sightline bench`: contenders that take turns, the figures made of their times, and the command."""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from command import cli, refusal
from sightline.benching import cases
from sightline.benching.apart import Processes, Side
from sightline.benching.bench import bench, lines
from sightline.benching.ceilings import Machine
from sightline.benching.contenders import Programs, model_of, noise
from sightline.benching.peers import PEERS, TORCHVISION, Peer
from sightline.benching.rounds import Contender, Ratio, Timed, by_clock, growth, take_turns
from sightline.benching.tables import CLASSES, Plan
from sightline.device import INT8
from sightline.errors import UserError
from sightline.inference.quantised import multiplies_int8
from sightline.network import count_parameters, create_model, describe, list_models

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MACHINE = Machine("a processor", 1, "2", "cpu", {"fp32": 50.0, "bf16": 100.0}, 20.0)


def test_contenders_take_turns_and_the_first_call_does_not_count():
    now, calls = 0.0, []

    def work(name, seconds):
        def done():
            nonlocal now
            calls.append(name)
            now += seconds * (10 if calls.count(name) == 1 else calls.count(name))

        return done

    one, other = take_turns(
        [Contender("a", work("a", 2.0)), Contender("b", work("b", 3.0))], 3, partial(by_clock, clock=lambda: now)
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert list(one.seconds) == [4.0, 6.0, 8.0]
    assert list(other.seconds) == [6.0, 9.0, 12.0]
    assert one.median == 6.0
    assert other.over(one) == Ratio(1.5, 1.5, 1.5)


def test_ratios_are_of_rounds_and_not_of_medians():
    slow = Timed("slow", [2.0, 30.0, 5.0]).over(Timed("fast", [1.0, 20.0, 1.0]))
    assert slow == Ratio(2.0, 1.5, 5.0)
    assert str(slow) == "2.00 (1.50 to 5.00)"


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_growth_is_the_power(power):
    sides = [96, 224, 320]
    assert growth(sides, [3e-4 * side**power for side in sides]) == pytest.approx(power)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_peers_have_networks_of_the_same_size(name):
    ours = sum(parameter.numel() for parameter in create_model(name, 10).parameters())
    found = {peer: row.network(describe(name, 10), 10) for peer, row in PEERS.items()}
    assert {peer for peer, network in found.items() if network is None} == {
        "vit_tiny_patch16_224": {"torchvision"},
        "swin_tiny_patch4_window7_224": set(),
        "resnet18": {"transformers"},
    }[name]
    for network in found.values():
        if network is not None:
            assert sum(parameter.numel() for parameter in network.parameters()) == ours
            assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_peers_follow_the_size_of_image_and_patch(name):
    plan = Plan(name, torch.device("cpu"), image_size=64, patch_size=2)
    architecture = plan.architecture()
    timms = PEERS["timm"].network(architecture, 10)
    assert count_parameters(timms) == count_parameters(architecture.build()) - (timms.num_features + 1) * 990
    assert timms(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert PEERS["torchvision"].network(architecture, 10) is None


def test_peers_take_part_in_their_best_settings():
    plan = Plan("resnet18", torch.device("cpu"), ("timm", "transformers"), ("bf16",), (2,), rounds=1, image_size=64)
    (table,) = cases.forward(plan, MACHINE)
    assert [row.name for row in table.rows] == ["sightline", "timm", "timm, autocast", "timm, channels last"]
    assert table.notes == [
        f"transformers is left out: version {PEERS['transformers'].version} has no resnet18 like this"
    ]


@pytest.mark.skipif(not multiplies_int8(), reason="this processor does not multiply 8-bit numbers")
def test_8_bits_stand_beside_the_best_of_others():
    plan = Plan("vit_tiny_patch16_224", torch.device("cpu"), ("timm",), (INT8,), (2,), rounds=1, image_size=32)
    (table,) = cases.forward(plan, MACHINE._replace(products={INT8: 1.0}))
    assert [row.name for row in table.rows] == ["sightline", "timm", "timm, autocast"]
    assert "others compute in bf16 here" in table.notes
    assert list(cases.training(plan, MACHINE)) == []


def test_8_bits_are_refused_where_there_are_none(monkeypatch):
    monkeypatch.setattr("sightline.benching.contenders.multiplies_int8", lambda: False)
    plan = Plan("vit_tiny_patch16_224", torch.device("cpu"), precisions=(INT8,), image_size=32)
    with pytest.raises(UserError, match="leave int8 out"):
        list(cases.forward(plan, MACHINE))


def test_programs_compute_the_same_network(monkeypatch):
    monkeypatch.setattr("sightline.inference.gate.photographs", list)
    network = create_model("vit_tiny_patch16_224", CLASSES, 32, depth=1)
    torch.nn.init.normal_(network.head.classifier.weight)
    model, plan = model_of(network), Plan("vit_tiny_patch16_224", torch.device("cpu"), runtimes=("onnx", "openvino"))
    monkeypatch.setitem(sys.modules, "openvino", None)  # not installed
    programs = Programs(model, plan)
    found, notes = programs.sides("fp32")
    predictor = model.predictor(device="cpu", precision="fp32")
    images = noise(predictor, 3)
    monkeypatch.setattr(
        "sightline.benching.contenders._pixels", lambda *about: torch.stack([image.pixels for image in images])
    )
    assert [side.name for side in found] == ["sightline's export in ONNX Runtime"]
    assert "OpenVINO is left out: openvino is not installed" in notes[0]
    answered = next(iter(found[0].make()(3).values()))
    torch.testing.assert_close(torch.from_numpy(answered), predictor.compute(images, features=False), rtol=0, atol=1e-4)
    found, notes = programs.sides("bf16")
    assert not found
    assert notes[1] == "ONNX Runtime computes this program in fp32 alone, and is left out in bf16"
    programs.close()


def test_a_step_of_a_masked_autoencoder_is_measured_beside_transformers():
    plan = Plan(
        "vit_tiny_patch16_224", torch.device("cpu"), ("transformers",), batch_sizes=(2,), rounds=1, image_size=32
    )
    (table,) = cases.mae(plan, MACHINE)
    ours, theirs = table.rows
    assert (ours.name, theirs.name) == ("sightline", "transformers")
    assert ours.parameters == pytest.approx(theirs.parameters, rel=0.01)
    assert ours.share_of_peak is None
    assert ours.megabytes is None or ours.megabytes > 1e-6 * 4 * 5e6  # a gradient at least
    (table,) = cases.mae(replace(plan, model="resnet18"), MACHINE)
    assert "left out: mae drops hidden patches" in table.notes[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where one core is all there is
def test_folders_are_answered_by_all_alike(monkeypatch):
    monkeypatch.setattr("sightline.benching.folders.FOLDERS", {"tiny": (37, 53, 3)})
    plan = Plan("vit_tiny_patch16_224", torch.device("cpu"), ("timm", "transformers"), rounds=1, image_size=32)
    (table,) = cases.predict(plan, MACHINE)
    assert table.title == "predict, vit_tiny_patch16_224, 3 JPEGs of 53×37"
    names = [row.name for row in table.rows]
    assert names[:4] == ["sightline", "sightline, fp32", "sightline, --draft", "transformers' pipeline"]
    assert names[4:] == ["transformers' pipeline, batches of 8", "timm, 0 workers", "timm, 2 workers"]
    for row in table.rows:
        assert row.images_per_second == pytest.approx(1 / row.seconds)
        assert row.share_of_peak is None
    said = " ".join(table.notes)
    for name in ("sightline", "transformers' pipeline", "transformers' pipeline, batches of 8"):
        assert f"{name} 100.0%" in said  # the weights are the same, and so is what is made of the pixels
    assert all(f"{part} " in said for part in ("decoding", "resizing", "the network in fp32"))


class _Here:
    """A contender that tells where it works, and leaves a file when it is closed."""

    parameters = 3

    def __init__(self, folder=None):
        self.folder = folder

    def __call__(self):
        return os.getpid()

    def close(self):
        if self.folder is not None:
            (self.folder / f"closed-{os.getpid()}").touch()


def _nowhere():
    raise UserError("there is none like this")


def test_packages_work_apart_and_each_contender_is_made_once(tmp_path):
    sides = [Side("a", "one", partial(_Here, tmp_path)), Side("b", "one", _Here), Side("c", "two", _Here)]
    with Processes() as processes:
        found, notes = processes.present([*sides, Side("d", "three", _nowhere), Side("e", "three", _nowhere)])
        assert [(side.name, parameters) for side, parameters in found] == [("a", 3), ("b", 3), ("c", 3)]
        assert notes == ["three is left out: there is none like this"]
        places = [processes.ask(side, _Here.__call__) for side in sides for _ in range(2)]
        assert places[0] == places[1] == places[2] == places[3] != places[4] == places[5]
        assert os.getpid() not in places
        assert processes.ask(sides[0], id) == processes.ask(sides[0], id)
        with pytest.raises(UserError, match="none like this"):
            processes.present([Side("sightline", "sightline", _nowhere)])
    assert [file.name for file in tmp_path.iterdir()] == [f"closed-{places[0]}"]


def test_torchvisions_names_are_of_networks_that_there_are():
    from torchvision import models

    assert set(TORCHVISION) <= set(list_models())
    assert set(TORCHVISION.values()) <= set(models.list_models())


def test_larger_images_cost_more_and_the_curve_says_how_much():
    plan = Plan("vit_tiny_patch16_224", torch.device("cpu"), sides=(32, 160, 320), rounds=1)
    (table,) = cases.resolution(plan, MACHINE)
    assert [(point.side, point.tokens) for point in table.points] == [(32, 4), (160, 100), (320, 400)]
    assert table.points[0].seconds < table.points[2].seconds
    assert table.exponents["seconds"] > 0
    words = "\n".join(lines(table))
    assert "320×320" in words
    assert "grow with the side to the power of" in words


def test_what_is_not_there_is_refused_or_left_out(monkeypatch):
    monkeypatch.setitem(PEERS, "absent", Peer("no-such-package", PEERS["timm"].network))
    plan = Plan("vit_tiny_patch16_224", torch.device("cpu"), peers=("absent",), sides=(32,), rounds=1)
    monkeypatch.setattr("sightline.benching.bench.machine", lambda *about: MACHINE)
    told = []
    done = bench(plan, ["resolution"], tell=told.extend)
    assert done.peers == {"absent": None}
    assert "absent is not installed, and is left out" in told
    for fault, words in (
        ({"peers": ("tim",)}, "unknown peer 'tim'. Did you mean timm?"),
        ({"precisions": ("int4",)}, "unknown precision 'int4'"),
        ({"runtimes": ("onix",)}, "unknown runtime 'onix'. Did you mean onnx?"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            bench(Plan("vit_tiny_patch16_224", torch.device("cpu"), **fault), ["resolution"])


def test_the_command_measures_and_writes_a_page(tmp_path):
    words = ("--model", "vit_tiny_patch16_224", "--against", "timm", "--batch-size", "1,2", "--sides", "32,48")
    done = cli("bench", *words, "--rounds", "2", "--runtimes", "none", "--json", "--out", tmp_path / "page.html")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document["machine"]["products"]["fp32"] > 1
    assert set(document["peers"]) == {"timm"}
    tables = {(table["case"], table["batch"]): table for table in document["tables"]}
    assert list(tables) == [("forward", 1), ("forward", 2), ("training", 2), ("resolution", 1)]
    for (case, batch), table in tables.items():
        if case == "resolution":
            continue
        assert [row["name"] for row in table["rows"]] == ["sightline", "timm"]
        assert table["rows"][0]["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0}
        for row in table["rows"]:
            assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
            assert 0 < row["share_of_peak"] < 1.5
            # multiply-adds of ViT-Ti/16 at 224 pixels, and as many additions; three times as many to learn
            flops = 2 * 1.258e9 * (3 if case == "training" else 1)
            peak = document["machine"]["products"]["fp32"] * 1e9
            assert row["share_of_peak"] == pytest.approx(flops / row["seconds"] / peak, rel=0.02), (case, batch)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "vit_tiny_patch16_224" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "vit_tinny_patch16_224"), "vit_tiny_patch16_224"),
        (("--rounds", "0"), "--rounds must lie in [1, 1000]"),
        (("--batch-size", "1,x"), "--batch-size takes whole numbers"),
        (("--sides", "0"), "--sides takes whole numbers"),
        (("--cases", "forwards"), "Did you mean forward?"),
        (("--images", "0"), "--images must lie in [1, 1000000]"),
        (("--runtimes", "openvinno"), "Did you mean openvino?"),
        pytest.param(("--device", "cuda"), "there is no device 'cuda'", marks=NO_GPU),
    ],
)
def test_requests_that_make_no_sense_are_refused(words, said):
    assert said in refusal("bench", *words)
