"""What every objective keeps, and the losses of each by hand and by the original's numbers."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from objectives import NAMES, SMALL, batch, network_for, objective
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.images.masks import blockwise, noise
from sightline.images.preprocess import Preprocess
from sightline.layers.encoder import rows_of
from sightline.network import Architecture, create_model
from sightline.objectives.beit import BEiT
from sightline.objectives.codebook import Decoder, log_laplace, usage
from sightline.objectives.dino import DINO, DINOConfig, momentum_at
from sightline.objectives.distill import Distill, DistillConfig, Teacher
from sightline.objectives.masked_patch import MaskedPatch, MaskedPatchConfig, colours
from sightline.objectives.masking import cut
from sightline.objectives.noisy_student import selected
from sightline.objectives.prototypes import PrototypeHead, crossed, koleo, sharpened, sinkhorn
from sightline.objectives.simmim import SimMIM, SimMIMConfig
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.training.distributed import World
from sightline.training.schedule import decay
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch

GOLDENS = Path(__file__).parent / "data" / "goldens"


def close(ours: torch.Tensor, theirs: torch.Tensor, most: float = 1e-5) -> None:
    assert float((ours.detach() - theirs).abs().max() / theirs.abs().max()) <= most


class TestEveryObjective:
    @pytest.mark.parametrize("name", NAMES)
    def test_teaches_the_whole_backbone(self, name):
        taught = objective(name)
        taught.before_update(0.5)
        step = taught(batch(taught, name))
        step.loss.backward()
        taught.after_backward()
        taught.after_update(0.5)
        assert step.loss.isfinite()
        assert all(value.ndim == 0 and value.isfinite() for value in step.metrics.values())
        still = [n for n, p in taught.network.backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert not still
        learned = [n for n, p in taught.named_parameters() if p.requires_grad and p.grad is None]
        assert not learned, learned

    @pytest.mark.parametrize(
        "name", [name for name in NAMES if name not in ("codebook", "noisy-student", "supervised")]
    )
    def test_parts_of_a_batch_make_the_update_of_the_whole(self, name):
        taught = objective(name)
        if name == "dino":  # spread is a matter of all images that are computed together
            taught = objective(name, koleo=0.0)
        other, whole = copy.deepcopy(taught), batch(taught, name, 6)
        for one, size in ((taught, None), (other, 2)):
            settings = Settings(optimizer="sgd", momentum=0.0, clip_grad=None, micro_batch=size)
            Updater(one, settings, World(0, 1, torch.device("cpu")), torch.float32)(whole, 3, 0.1, 0.5)
            one.after_update(0.5)
        for (key, a), b in zip(taught.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5, msg=lambda text, key=key: f"{key}: {text}")

    @pytest.mark.parametrize("name", ["mae", "beit", "masked-patch", "simmim"])
    @pytest.mark.parametrize("model", ["resnet18", "vit_pico_patch4_32"])
    def test_refuses_networks_that_give_hidden_patches_away(self, name, model):
        more = {"tokenizer": "convolution"} if model.startswith("vit") else {}
        kind = type(objective(name))
        given = {"words": objective("beit").words} if name == "beit" else {}
        with pytest.raises(UserError, match=r"take (simmim|--tokenizer patch|a Vision Transformer)"):
            kind(create_model(model, 0, **more), **given)


class TestMasks:
    def test_blocks_are_those_of_the_paper(self):
        masks = blockwise(torch.arange(300), (14, 14), 75)
        counts = masks.sum(dim=1)
        assert int(counts.max()) == 75
        assert float(counts.float().mean()) > 74  # the last block may find no place
        assert int(counts.min()) > 75 - 16  # less than a block is missing
        inside = masks.view(-1, 14, 14)
        # Blocks, not single patches: most hidden patches have a hidden neighbour on their right, below, or before.
        alike = (inside[:, :, 1:] & inside[:, :, :-1]).sum() / inside[:, :, 1:].sum()
        assert float(alike) > 0.7
        places = masks.float().mean(dim=0).view(14, 14)
        assert float(places[5:9, 5:9].mean()) > float(places[0, 0])

    @given(st.integers(0, 2**62), st.integers(1, 9), st.integers(1, 9), st.data())
    def test_no_more_than_asked_for(self, key, rows, columns, data):
        count = data.draw(st.integers(0, rows * columns))
        masks = blockwise(torch.tensor([key, key + 1]), (rows, columns), count)
        assert masks.shape == (2, rows * columns)
        assert int(masks.sum(dim=1).max()) <= count
        assert torch.equal(masks[1:], blockwise(torch.tensor([key + 1]), (rows, columns), count))

    def test_noise_follows_from_the_key_alone(self):
        keys = torch.tensor([5, 2**62, 7])
        drawn = noise(keys, 13)
        assert torch.equal(drawn[1], noise(keys[1:2], 13)[0])
        assert not torch.equal(drawn, noise(keys, 13, salt=1))
        assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1

    def test_patches_are_cut_row_by_row(self):
        pixels = torch.arange(2 * 6 * 9).float().view(1, 2, 6, 9)
        patches = cut(pixels, (2, 3), (3, 3))
        assert patches[0, 4].tolist()[:4] == [30, 84, 31, 85]  # second row, second column; channels alternate
        assert cut(pixels, (3, 3), (3, 3))[0, 6:].sum() == 0


class TestMaskedPatch:
    def test_colours_by_hand(self):
        pixels = torch.zeros(1, 3, 2, 4)
        pixels[0, :, :, :2] = torch.tensor([0.5, 0.999, 0.1])[:, None, None]
        pixels[0, :, :, 2:] = torch.tensor([1.0, 0.0, 0.126])[:, None, None]
        assert colours(pixels, (1, 2), (2, 2)).tolist() == [[4 * 64 + 7 * 8 + 0, 7 * 64 + 0 + 1]]

    def test_eight_of_ten_are_hidden_one_exchanged_one_stays(self):
        taught = MaskedPatch(network_for("masked-patch"), MaskedPatchConfig())
        x = torch.randn(2, 15, 12)
        places = torch.arange(10).expand(2, -1)
        fate = torch.linspace(0.05, 0.95, 10).expand(2, -1)
        other = torch.full((2, 10), 0.999)
        changed = taught.corrupted(x, places, fate, other)
        assert torch.equal(changed[:, :8], taught.mask_token.expand(2, 8, -1))
        assert torch.equal(changed[:, 8], x[:, 7])  # 8 + 1 + 13, around the end of 15
        assert torch.equal(changed[:, 9:], x[:, 9:])


class TestSimMIM:
    def test_swin_hides_areas_of_its_last_stage(self):
        size = {"image_size": (32, 48), "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4}
        network = create_model("swin_tiny_patch4_window7_224", 0, **size)
        taught = SimMIM(network, SimMIMConfig(0.5)).train()
        assert (taught.grid, taught.area, taught.hidden) == ((4, 6), (8, 8), 12)
        images = torch.randn(2, 3, 32, 48)
        given = Batch(images, torch.zeros(2).long(), torch.arange(2), torch.arange(2))
        step = taught(given)
        step.loss.backward()
        assert taught.mask_token.grad.any()
        hidden = noise(given.key, 24).argsort(dim=1)[:, :12]
        torch.nn.init.zeros_(taught.pixels.weight)
        torch.nn.init.zeros_(taught.pixels.bias)
        wanted = torch.stack([cut(images, (4, 6), (8, 8))[i, hidden[i]] for i in range(2)])
        torch.testing.assert_close(taught(given).loss, wanted.abs().mean())

    def test_others_say_what_to_take(self):
        size = {"image_size": (32, 48), "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4}
        network = create_model("swin_tiny_patch4_window7_224", 0, **size)
        with pytest.raises(UserError, match="take simmim"):
            BEiT(network, words=objective("beit").words)
        with pytest.raises(UserError, match="choose another --image-size"):
            SimMIM(create_model("swin_tiny_patch4_window7_224", 0, **{**size, "image_size": (36, 48)}))


class TestDINO:
    def test_head_loss_centre_and_teacher_are_the_original_s(self):
        io = load_file(GOLDENS / "dino-head-loss" / "io.safetensors")
        weights = load_file(GOLDENS / "dino-head-loss" / "weights.safetensors")
        heads = {who: PrototypeHead(20, 37, hidden=26, bottleneck=11) for who in ("student", "teacher")}
        for who, head in heads.items():
            state = {k.removeprefix(f"{who}."): v for k, v in weights.items() if k.startswith(who)}
            last = {"last.weight": state.pop("last_layer.weight_v"), "scale": state.pop("last_layer.weight_g")}
            head.load_state_dict(state | last)
        student, teacher = (
            heads["student"](io["input.student_features"]),
            heads["teacher"](io["input.teacher_features"]),
        )
        close(student, io["output.student_logits"])
        close(teacher, io["output.teacher_logits"])
        taught = DINO(
            network_for("dino"), DINOConfig(37, 26, 11, warm_teacher_temperature=0.04, teacher_temperature=0.07)
        )
        heat = taught.temperature(0.3 * 2 / 3)  # the third of four epochs of warm-up, which ends at the fourth
        assert heat == pytest.approx(0.06)
        targets = sharpened(teacher.view(2, 3, 37), io["input.center"][0], heat)
        loss = crossed(targets, student.view(5, 3, 37), 0.1)
        close(loss[None], io["output.loss"])
        loss.backward()
        gradients = {name: p.grad for name, p in heads["student"].named_parameters() if p.grad is not None}
        names = {"last.weight": "last_layer.weight_v"}
        for name, gradient in gradients.items():
            close(gradient, io[f"output.gradient.{names.get(name, name)}"])
        for p in heads["student"].parameters():
            if p.grad is not None:
                torch.nn.utils.clip_grad_norm_(p, 0.3)
        for name, p in heads["student"].named_parameters():
            if p.grad is not None:
                close(p.grad, io[f"output.clipped.{names.get(name, name)}"])
        taught.head, taught.teacher_head = heads["student"], heads["teacher"]
        taught.centre[0] = io["input.center"][0]
        taught._sum(0, teacher)
        with torch.no_grad():
            taught.after_update(7 / 27)
        close(taught.centre[:1], io["output.center"])
        close(taught.teacher_head.last.weight, io["output.moved_teacher.last_layer.weight_v"])
        close(taught.teacher_head.mlp[2].bias, io["output.moved_teacher.mlp.2.bias"])

    def test_schedules_are_the_original_s(self):
        io = load_file(GOLDENS / "dino-head-loss" / "io.safetensors")
        settings = Settings(weight_decay=0.04, weight_decay_end=0.4)
        steps = len(io["output.schedule.momentum"])
        ours = [momentum_at(0.996, step / steps) for step in range(steps)]
        np.testing.assert_allclose(ours, io["output.schedule.momentum"].numpy(), rtol=1e-9)
        ours = [decay(settings, step / steps) for step in range(steps)]
        np.testing.assert_allclose(ours, io["output.schedule.weight_decay"].numpy(), rtol=1e-9)

    def test_the_last_layer_rests_at_first_and_the_teacher_never_learns(self):
        taught = objective("dino", frozen_last=0.1, ibot=0.0)
        for progress, moves in ((0.05, False), (0.2, True)):
            taught.zero_grad()
            taught.before_update(progress)
            taught(batch(taught, "dino")).loss.backward()
            taught.after_backward()
            assert (taught.head.last.weight.grad is not None) == moves
        assert all(p.grad is None for p in taught.teacher.parameters())
        assert taught.kept is taught.teacher
        assert not taught.teacher.training

    def test_every_view_has_stochastic_depth_of_its_own(self):
        network = network_for("dino", drop_path_rate=0.5).train()
        pixels = torch.randn(3, 3, 24, 40)
        torch.manual_seed(1)
        with rows_of(0, 3, 3):
            both = network.backbone(torch.cat([pixels, pixels])).x
        assert not torch.allclose(both[:3], both[3:])
        torch.manual_seed(1)
        with rows_of(1, 3, 2):
            part = network.backbone(torch.cat([pixels[1:], pixels[1:]])).x
        torch.testing.assert_close(part, both[[1, 2, 4, 5]])

    def test_sinkhorn_uses_all_prototypes(self):
        shares = sinkhorn(torch.randn(40, 5) * 0.2 + torch.tensor([1.0, 0, 0, 0, 0]), 0.1, iterations=50)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(40))
        torch.testing.assert_close(shares.sum(dim=0), torch.full((5,), 8.0), atol=0.05, rtol=0)
        once = sinkhorn(torch.zeros(4, 3), 1.0)
        torch.testing.assert_close(once, torch.full((4, 3), 1 / 3))

    def test_koleo_by_hand(self):
        features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        assert float(koleo(features)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
        assert float(koleo(features[:1])) == 0


class TestCodebook:
    @pytest.mark.parametrize("shape", ["square", "wide"])
    def test_encoder_and_decoder_are_dall_e_s(self, shape):
        folder = GOLDENS / "dvae"
        io, encoder = load_file(folder / "io.safetensors"), load_bundle(folder / "encoder.safetensors").network
        decoder = Decoder(41, 3, hidden=8, groups_=4, blocks=2, first=10)
        theirs = load_file(folder / "decoder.safetensors")
        state = {}
        for name, tensor in theirs.items():
            name = name.removeprefix("blocks.").replace("output.conv", "output").replace(".id_path", ".shortcut")
            for number in range(4, 0, -1):
                name = name.replace(f"group_{number}.", f"groups.{number - 1}.").replace(
                    f"block_{number}", str(number - 1)
                )
                name = name.replace(f"res_path.conv_{number}", f"convolutions.{number - 1}")
            state[name.removesuffix(".w") + ".weight" if name.endswith(".w") else name[:-1] + "bias"] = tensor
        decoder.load_state_dict(state)
        pixels = 0.8 * io[f"input.pixels_{shape}"] + 0.1
        tokens = encoder.backbone(pixels)
        logits = io[f"output.logits_{shape}"]
        close(tokens.x.transpose(1, 2).reshape(logits.shape), logits)
        assert torch.equal(tokens.x.argmax(dim=-1).view(1, *tokens.grid), io[f"output.tokens_{shape}"])
        codes = F.one_hot(io[f"input.tokens_{shape}"].long(), 41).permute(0, 3, 1, 2).float()
        close(decoder(codes), io[f"output.statistics_{shape}"])

    def test_the_encoder_is_a_backbone_like_others(self):
        network = create_model("dvae_small_4_32", 5, image_size=(32, 48), hidden=8, groups=2, vocab_size=12).eval()
        torch.nn.init.normal_(network.head.classifier.weight)
        images = [torch.randn(3, *size) for size in ((33, 47), (70, 20), (16, 16))]
        canvas = torch.full((3, 3, 70, 47), 7.0)
        for row, image in zip(canvas, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        together = network(canvas, torch.tensor([image.shape[1:] for image in images]))
        for image, answer in zip(images, together, strict=True):
            torch.testing.assert_close(answer, network(image[None])[0], atol=1e-5, rtol=1e-4)
        tokens, stages = network.backbone(images[0][None]), network.backbone.stages(images[0][None])
        assert tokens.grid == stages[-1].grid == network.backbone.grid_of((33, 47)) == (16, 23)
        assert tokens.x.shape == (1, 16 * 23, 12)
        layers = {network.backbone.layer_of(name) for name, _ in network.backbone.named_parameters()}
        assert layers == {0, 1, 2, 3}
        assert Architecture.from_json(network.architecture.to_json()) == network.architecture

    def test_the_density_of_pixels_sums_to_one(self):
        at = torch.linspace(0.0005, 0.9995, 20001)
        statistics = torch.tensor([0.7, math.log(0.4)]).view(1, 2, 1, 1).expand(1, 2, 1, len(at))
        density = (-log_laplace(at.view(1, 1, 1, -1), statistics)).exp()
        assert float(torch.trapezoid(density.flatten(), at)) == pytest.approx(1, abs=2e-3)

    def test_usage_by_hand(self):
        told = usage(torch.tensor([3, 3, 5, 5, 1, 1]), 12)
        assert float(told["codebook_perplexity"]) == pytest.approx(3)
        assert float(told["codebook_use"]) == pytest.approx(0.25)

    def test_any_function_may_be_the_codebook(self):
        class Brightness:
            vocabulary, step = 4, (1, 1)

            def __call__(self, pixels):
                return (pixels.mean(dim=1).flatten(1) * 4).long().clamp(max=3)

        taught = BEiT(network_for("beit"), words=Brightness())
        step = taught(batch(taught, "beit"))
        assert 0 < float(step.metrics["baseline"]) <= math.log(4) + 1e-6


class TestTeachers:
    def test_losses_by_hand(self):
        answers = torch.tensor([[4.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
        given = Batch(torch.randn(2, 3, 24, 40), torch.tensor([2, 1]), torch.tensor([0, 1]), torch.arange(2))
        network = network_for("distill").eval()
        tokens = network.backbone(given.pixels)
        of_labels, of_teacher = network.head.pair(tokens)
        hard = Distill(network, DistillConfig(alpha=0.3), answers=answers).eval()
        expected = 0.7 * F.cross_entropy(of_labels, given.targets) + 0.3 * F.cross_entropy(
            of_teacher, torch.tensor([0, 1])
        )
        torch.testing.assert_close(hard(given).loss, expected)
        soft = Distill(network, DistillConfig(alpha=0.3, kind="soft", temperature=2.0), answers=answers).eval()
        apart = F.kl_div((of_teacher / 2).log_softmax(1), (answers / 2).softmax(1), reduction="batchmean")
        expected = 0.7 * F.cross_entropy(of_labels, given.targets) + 0.3 * 4 * apart
        torch.testing.assert_close(soft(given).loss, expected)
        with pytest.raises(UserError, match="the teacher knows 2 classes, and there are 3"):
            Distill(network, answers=answers[:, :2])

    def test_a_teacher_sees_what_the_student_sees(self):
        pictures = torch.randint(256, (5, 3, 24, 40), dtype=torch.uint8)
        students, own = Preprocess((24, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), Preprocess((24, 40))
        asked = create_model("vit_tiny_patch16_224", 4, (24, 40), patch_size=8, embed_dim=12, depth=1, num_heads=2)
        for parameter in asked.parameters():
            nn.init.normal_(parameter, std=0.3)
        told = Teacher(asked, own, students, [3, 0, 2])
        pixels = torch.stack([students.normalise(picture) for picture in pictures])
        expected = asked(torch.stack([own.normalise(picture) for picture in pictures]))[:, [3, 0, 2]]
        torch.testing.assert_close(told(pixels), expected, rtol=0, atol=1e-5)
        given = Batch(pixels, torch.tensor([2, 1, 0, 0, 1]), torch.arange(5), torch.arange(5))
        taught = Distill(network_for("distill"), DistillConfig(alpha=1.0, kind="soft", mixup=0.8), teacher=told).train()
        mixed, _ = taught.mixed(given, given.targets, 0.0)
        assert not torch.equal(mixed, pixels)
        loss = taught(given).loss
        taught.eval()  # which mixes nothing
        torch.testing.assert_close(loss, taught(given._replace(pixels=mixed)).loss)
        loss.backward()
        assert all(parameter.grad is None for parameter in asked.parameters())

    def test_a_teacher_stays_as_it_is_and_takes_its_own_size(self):
        asked = nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        plain = Preprocess((24, 40), mean=(0.0,) * 3, std=(1.0,) * 3)
        told = Teacher(asked, plain.replace(size=(11, 17)), plain, [0, 1, 2])
        pixels = torch.rand(2, 3, 24, 40)
        smaller = F.interpolate(pixels, (11, 17), mode="bilinear", antialias=True)
        for mode in (True, False):
            torch.testing.assert_close(told.train(mode)(pixels), smaller.mean(dim=(2, 3)))

    def test_the_surest_are_taken_and_rare_classes_repeated(self):
        chances = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.45, 0.55], [0.3, 0.7], [0.05, 0.95]])
        assert selected(chances, 0.5, 2).tolist() == [0, 2, 5, 4]
        assert selected(chances, 0.75, 9).tolist() == [0, 2, 5, 5]
        assert selected(chances, 0.99, 9).tolist() == []

    def test_sigmoid_loss_and_its_start(self):
        network = create_model("vit_tiny_patch16_224", 5, **SMALL)
        taught = Supervised(network, SupervisedConfig(loss="sigmoid")).eval()
        given = Batch(torch.randn(2, 3, 24, 40), torch.tensor([2, 1]), torch.arange(2), torch.arange(2))
        assert taught(given).loss.item() == pytest.approx(math.log(6) + 4 * math.log(6 / 5), abs=1e-5)
