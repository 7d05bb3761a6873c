"""Images and texts: towers, losses, zero-shot answers and retrieval, each against values found in another way."""

import json
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import sightline
from parity.clip import LENGTH, SMALL, SMALL_TEXT, WORDS, flat, ids_of, reference
from sightline.backbones.text import TextTower
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.sealed import sealed
from sightline.errors import UserError
from sightline.evaluation.retrieval import Retrieval, recall
from sightline.evaluation.zero_shot import ZeroShot
from sightline.heads.zero_shot import ensemble
from sightline.images.preprocess import Preprocess
from sightline.inference.zero_shot import class_vectors
from sightline.model import Model
from sightline.network import ImageTextNetwork, create_model, describe
from sightline.objectives.clip import Contrastive, contrastive_loss, same_text, sigmoid_loss
from sightline.texts.byte_pairs import Vocabulary
from sightline.texts.vocabularies import folder_files, learned, to_json
from sightline.types import Batch


class Tree(nn.Module):
    """A module that does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _tree(tensors: dict[str, Tensor]) -> nn.Module:
    """Modules whose state dict this is."""
    root = Tree()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        here: nn.Module = root
        for part in path:
            if part not in dict(here.named_children()):
                here.add_module(part, Tree())
            here = here.get_submodule(part)
        here.register_buffer(last, tensor)
    return root


def small(**settings) -> ImageTextNetwork:
    """A little network of which every weight matters."""
    given = {**SMALL, **SMALL_TEXT, "context_length": LENGTH, "image_size": 32, **settings}
    network = create_model("ViT-B-32-quickgelu", **given)
    assert isinstance(network, ImageTextNetwork)
    return network.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A model with a vocabulary of its own."""
    words = learned(["a red circle and a blue square", "a green star"] * 3, 540)
    network = small(vocab_size=len(words), context_length=13)
    preprocess = Preprocess(size=(32, 32))
    folder = tmp_path_factory.mktemp("clip")
    Model(network, preprocess, (), "clip", vocabulary=words).save(folder)
    return sightline.load(folder)


class TestTowers:
    def test_what_follows_the_end_is_never_seen(self) -> None:
        network, ids = small(), ids_of(5)
        other = ids.clone()
        for row, end in zip(other, ids.argmax(dim=1).tolist(), strict=True):
            row[end + 1 :] = 3
        assert torch.equal(network.encode_text(ids), network.encode_text(other))
        shorter = network.encode_text(ids[:1, : int(ids[0].argmax()) + 1])
        torch.testing.assert_close(network.encode_text(ids[:1]), shorter)

    def test_no_token_sees_what_comes_after_it(self) -> None:
        tower = TextTower(12, depth=2, heads=3, hidden=20, length=7, vocabulary=11).eval()
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
        before = tower.tokens(ids)
        ids[0, 4] = 8
        after = tower.tokens(ids)
        assert torch.equal(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4:], after[:, 4:])

    def test_the_end_is_its_own_token_or_the_highest(self) -> None:
        ids = torch.tensor([[3, 7, 2, 9, 2], [3, 2, 9, 0, 0]])
        settings = {"depth": 1, "heads": 1, "hidden": 4, "length": 5, "vocabulary": 10}
        assert TextTower(4, **settings).ends(ids).tolist() == [3, 2]
        assert TextTower(4, **settings, end=2).ends(ids).tolist() == [2, 1]

    @torch.no_grad()
    def test_logits_are_scaled_cosines(self) -> None:
        network, pixels, ids = small(), torch.randn(2, 3, 32, 32), ids_of(3)
        images, texts = network.encode_image(pixels).detach(), network.encode_text(ids).detach()
        expected = [
            [float(network.head.logit_scale.exp().detach() * torch.cosine_similarity(i, t, dim=0)) for t in texts]
            for i in images
        ]
        found = network(pixels, ids)
        torch.testing.assert_close(found.logits_per_image, torch.tensor(expected), atol=1e-4, rtol=1e-4)
        assert torch.equal(found.logits_per_text, found.logits_per_image.T)
        torch.testing.assert_close(network.encode_image(pixels, normalize=True).norm(dim=1), torch.ones(2))

    def test_every_parameter_receives_a_gradient(self) -> None:
        network = small(logit_bias_init=-10.0).train()
        images, texts = network(torch.randn(3, 3, 32, 32), ids_of(3))
        (images.square().sum() + texts.sum()).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_each_image_of_an_unlike_batch_is_where_it_is_alone(self) -> None:
        network = small()
        images = [torch.randn(3, *size) for size in ((32, 48), (56, 16))]
        canvas = torch.full((2, 3, 56, 48), 9.0)
        for row, image in zip(canvas, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        together = network.encode_image(canvas, torch.tensor([image.shape[1:] for image in images]))
        alone = torch.cat([network.encode_image(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"text_heads": 3}, "multiple of text_heads"),
            ({"text_depth": 2_000}, "text_depth"),
            ({"text_activation": "gulu"}, "text_activation"),
            ({"eos_token_id": 97}, "not in the vocabulary"),
            ({"num_classes": 5}, "no setting 'num_classes'"),
            ({"context_length": 0}, "context_length"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, settings, words) -> None:
        with pytest.raises(UserError, match=words):
            small(**settings)


class TestLosses:
    LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.5, 0.0], [1.0, -1.0, 3.0]])

    def test_contrastive_by_hand(self) -> None:
        z, total = self.LOGITS.tolist(), 0.0
        for i in range(3):
            total -= z[i][i] - math.log(sum(math.exp(z[i][k]) for k in range(3)))
            total -= z[i][i] - math.log(sum(math.exp(z[k][i]) for k in range(3)))
        loss = contrastive_loss(self.LOGITS, torch.eye(3, dtype=torch.bool))
        assert float(loss) == pytest.approx(total / 6, rel=1e-6)

    def test_equal_texts_share_the_target(self) -> None:
        same = same_text(torch.tensor([[1, 2], [3, 4], [1, 2]]))
        assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
        log = self.LOGITS.log_softmax(dim=1)
        log_t = self.LOGITS.T.log_softmax(dim=1)
        rows = [-(x[0, 0] + x[0, 2]) / 2 - x[1, 1] - (x[2, 0] + x[2, 2]) / 2 for x in (log, log_t)]
        torch.testing.assert_close(contrastive_loss(self.LOGITS, same), sum(rows) / 6)

    def test_sigmoid_by_hand(self) -> None:
        total = 0.0
        for i, row in enumerate(self.LOGITS.tolist()):
            for j, z in enumerate(row):
                total += math.log(1 + math.exp(-z if i == j else z))
        loss = sigmoid_loss(self.LOGITS, torch.eye(3, dtype=torch.bool))
        assert float(loss) == pytest.approx(total / 3, rel=1e-6)

    def test_the_temperature_is_learned_and_bounded(self) -> None:
        objective = Contrastive(small())
        with torch.no_grad():
            objective.network.head.logit_scale.fill_(5.0)
        objective.after_update(0.5)
        assert objective.network.head.logit_scale.detach().exp().item() == pytest.approx(100.0)
        index = torch.arange(3)
        step = objective(Batch(torch.randn(3, 3, 32, 32), ids_of(3), index, index))
        step.loss.backward()
        assert objective.network.head.logit_scale.grad is not None

    def test_a_bias_makes_it_siglip(self) -> None:
        objective, index = Contrastive(small(logit_bias_init=-10.0)), torch.arange(3)
        batch = Batch(torch.randn(3, 3, 32, 32), ids_of(3), index, index)
        logits, _ = objective.network(batch.pixels, batch.targets)
        torch.testing.assert_close(objective(batch).loss, sigmoid_loss(logits, torch.eye(3, dtype=torch.bool)))


class TestZeroShot:
    def test_an_ensemble_is_the_mean_of_unit_vectors(self) -> None:
        vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
        mean = np.array([0.6 + 0.0, 0.8 + 1.0]) / 2
        expected = [mean / np.linalg.norm(mean), [1.0, 0.0]]
        torch.testing.assert_close(ensemble(vectors, [0, 0, 1], 2), torch.tensor(np.array(expected)).float())

    def test_answers_are_those_of_an_independent_computation(self, model, tmp_path: Path) -> None:
        labels, templates = ["red circle", "blue square", "green star"], ["a {}", "a {} and a {}"]
        path = tmp_path / "image.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 41, 3), dtype=np.uint8)).save(path)
        (answer,) = model.predict([path], labels=labels, prompts=templates, top=3)
        network = model.network
        with torch.no_grad():
            image = network.encode_image(model.preprocess(path)[None])[0]
            logits = []
            for label in labels:
                rows = [network.encode_text(model.vocabulary(t.replace("{}", label), 13))[0] for t in templates]
                mean = sum(row / row.norm() for row in rows) / 2
                logits.append(float(network.head.logit_scale.exp() * torch.cosine_similarity(image, mean, dim=0)))
        expected = torch.tensor(logits).softmax(dim=0)
        for score in answer.top:
            assert score.score == pytest.approx(float(expected[score.index]), abs=1e-5)
            assert score.label == labels[score.index]
        assert answer.index == int(expected.argmax())

    def test_counts_are_those_of_plain_logits(self, model) -> None:
        labels = ("red circle", "blue square", "green star")
        measure = ZeroShot(3, lambda network: class_vectors(network, model.vocabulary, labels, ["a {}"]))
        pixels, targets, index = torch.randn(7, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7)
        with torch.no_grad():
            measure.begin(model.network)
            measure.take(model.network(pixels), Batch(pixels, targets, index, index))
            logits, _ = model.network(pixels, model.tokenize([f"a {label}" for label in labels]))
        right = float((logits.argmax(dim=1) == targets).float().mean())
        measure.refused.append(("broken.png", "why"))
        assert measure.metrics()["zero_shot_top1"] == pytest.approx(right * 7 / 8)

    def test_without_labels_there_is_nothing_to_choose_from(self, model, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="name labels"):
            model.predict([np.zeros((8, 8, 3), dtype=np.uint8)])

    def test_a_model_without_texts_takes_no_labels(self) -> None:
        network = create_model("vit_femto_patch4_32", 3)
        plain = Model(network, Preprocess(size=(32, 32)), ("a", "b", "c"))
        with pytest.raises(UserError, match="reads no texts"):
            plain.predict([np.zeros((8, 8, 3), dtype=np.uint8)], labels=["x"])


class TestRetrieval:
    def test_recall_against_a_loop(self) -> None:
        draw = np.random.default_rng(3)
        images, texts = draw.normal(size=(11, 5)), draw.normal(size=(17, 5))
        fits = draw.random((11, 17)) < 0.15
        for k in (1, 5):
            expected = []
            for i in range(11):
                cosines = [images[i] @ t / np.linalg.norm(images[i]) / np.linalg.norm(t) for t in texts]
                best = sorted(range(17), key=lambda j: -cosines[j])[:k]
                expected.append(float(any(fits[i][j] for j in best)))
            found = recall(torch.tensor(images), torch.tensor(texts), torch.tensor(fits), k)
            assert found.tolist() == expected

    def test_equal_captions_are_one_and_unread_images_count(self) -> None:
        class Texts(nn.Module):
            def encode_text(self, ids: Tensor) -> Tensor:
                return nn.functional.one_hot(ids[:, 0], 4).float()

        measure = Retrieval()
        measure.begin(Texts())
        vectors = torch.eye(4)[[0, 1, 0, 3]]
        targets = (torch.tensor([[0], [2]]), torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[2]]))
        measure.take(vectors, Batch(torch.zeros(4, 3, 2, 2), targets, torch.arange(4), torch.arange(4)))
        measure.refused.append(("lost.png", "why"))
        found = measure.metrics()
        assert len(measure.texts) == 3
        assert found["image_to_text_r1"] == pytest.approx(
            3 / 5
        )  # the fourth says 2 and is found at 3, the fifth is lost
        assert found["text_to_image_r1"] == pytest.approx(3 / 3)  # 2 is nobody's vector; the first of equals is its own

    def test_parts_make_the_whole(self) -> None:
        network, pixels = small(), torch.randn(6, 3, 32, 32)
        targets = tuple(ids_of(2 * 6)[2 * i : 2 * i + 1 + i % 2] for i in range(6))
        batch = Batch(pixels, targets, torch.arange(6), torch.arange(6))
        with torch.no_grad():
            output = network(pixels)
            whole, first, second = Retrieval(), Retrieval(), Retrieval()
            for measure, start, stop in ((whole, 0, 6), (first, 0, 4), (second, 4, 6)):
                measure.begin(network)
                measure.take(output[start:stop], batch.part(start, stop))
        assert first.merge([second]).metrics() == whole.metrics()


class TestFiles:
    def test_vectors_are_those_of_transformers(self, tmp_path: Path) -> None:
        theirs, pixels, ids = reference(), torch.randn(2, 3, 32, 32), ids_of(3)
        theirs.save_pretrained(tmp_path)
        network = load_bundle(tmp_path).network
        assert isinstance(network, ImageTextNetwork)
        with torch.no_grad():
            answer = theirs(pixel_values=pixels, input_ids=ids)
            ours = network.encode_image(pixels, normalize=True), network.encode_text(ids, normalize=True)
        for mine, yours in zip(ours, (answer.image_embeds, answer.text_embeds), strict=True):
            assert float((mine - yours).abs().max() / yours.abs().max()) < 1e-5

    def test_the_vocabulary_stays_with_the_model(self, model, tmp_path: Path) -> None:
        model.save(tmp_path / "again")
        other = tmp_path / "other"
        other.mkdir()
        for name, content in folder_files(learned(["x"], 514)).items():
            (other / name).write_bytes(content)
        assert sightline.load(tmp_path / "again").vocabulary == model.vocabulary
        with pytest.raises(UserError, match="vocabulary"):
            sightline.load(tmp_path / "again", vocabulary=other)
        (tmp_path / "again" / "vocabulary.json").write_bytes((tmp_path / "again" / "config.json").read_bytes())
        with pytest.raises(UserError, match=r"vocabulary\.json"):
            sightline.load(tmp_path / "again")
        same_size = Vocabulary(
            (*model.vocabulary.tokens[512:], *model.vocabulary.tokens[:512]), model.vocabulary.merges
        )
        (tmp_path / "again" / "vocabulary.json").write_bytes(sealed(to_json(same_size)))
        with pytest.raises(UserError, match="not the vocabulary that the model was saved with"):
            sightline.load(tmp_path / "again")

    def test_a_flat_file_that_is_not_openai_s_has_to_say_its_activation(self, tmp_path: Path) -> None:
        save_file(flat(reference()), tmp_path / "clip.safetensors")
        with pytest.raises(UserError, match="activation"):
            sightline.load(tmp_path / "clip.safetensors", num_heads=3, text_heads=5)
        quick = sightline.load(tmp_path / "clip.safetensors", num_heads=3, text_heads=5, activation="quick_gelu")
        plain = sightline.load(tmp_path / "clip.safetensors", num_heads=3, text_heads=5, activation="gelu")
        pixels = torch.randn(1, 3, 32, 32)
        assert not torch.allclose(quick.network(pixels), plain.network(pixels), atol=1e-3)

    def test_openai_s_own_files_are_programs_and_are_read_without_running(self, tmp_path: Path) -> None:
        tensors = flat(reference())
        numbers = {"input_resolution": 32, "context_length": LENGTH, "vocab_size": WORDS}
        named = {name: tensor.half() for name, tensor in tensors.items()}
        named |= {name: torch.tensor(number) for name, number in numbers.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(_tree(named)).save(tmp_path / "ViT-B-32.pt")
        loaded = sightline.load(tmp_path / "ViT-B-32.pt", num_heads=3, text_heads=5)
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "plain.pt")
        plain = sightline.load(tmp_path / "plain.pt", num_heads=3, text_heads=5)
        assert loaded.network.architecture == plain.network.architecture
        for name, tensor in plain.network.state_dict().items():
            assert torch.equal(tensor, loaded.network.state_dict()[name])
        assert any("TorchScript" in note for note in loaded.coverage.notes)

    def test_a_program_that_holds_itself_is_refused(self, tmp_path: Path) -> None:
        # PROTO 2, an object of a program into the memo, and its attributes: itself and, beside it, another name of it
        program = (
            b"\x80\x02c__torch__\nM\n)\x81q\x00}q\x01(X\x04\x00\x00\x00selfq\x02h\x00X\x01\x00\x00\x00aq\x03h\x00ub."
        )
        with zipfile.ZipFile(tmp_path / "loop.pt", "w") as archive:
            archive.writestr("m/data.pkl", program)
        with pytest.raises(UserError, match="twice"):
            sightline.load(tmp_path / "loop.pt")

    def test_other_settings_of_transformers_are_refused(self, tmp_path: Path) -> None:
        reference().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for part, change, fault in (
            ("text_config", {"hidden_act": "gulu"}, "hidden_act"),
            ("vision_config", {"strange": 1}, "strange"),
            ("text_config", {"vocab_size": WORDS + 1}, "token_embedding"),
        ):
            (tmp_path / "config.json").write_text(json.dumps({**config, part: {**config[part], **change}}))
            with pytest.raises(UserError, match=fault):
                sightline.load(tmp_path)


def test_names_are_openai_s_and_open_clip_s_too() -> None:
    assert describe("ViT-B/32-quickgelu") == describe("ViT-B-32-quickgelu")
