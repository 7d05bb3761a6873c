"""Networks as the processor computes them fastest: the same numbers in fp32, near ones in bf16, in every family."""

import gc
import os
import sys
import threading
import weakref

import pytest
import torch
from PIL import Image
from torch import nn

from sightline.inference import predictor as predicting
from sightline.inference.packed import LowBackbone, PackedLinear, PackedMlp, computes_bf16, packed, packs
from sightline.inference.reading import BLOCKS, LAST, readers
from sightline.layers.attention import Attention
from sightline.layers.encoder import ACTIVATIONS, Mlp
from test_networks import KINDS, small
from test_predictor import image, network, predictor, scores


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_fp32_is_the_same_but_for_the_order_of_sums(self, kind):
        plain, pixels = small(kind), torch.randn(3, 3, 33, 47)
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        with torch.inference_mode():
            expected = plain(pixels)
            copy = packed(plain)
            for _ in range(2):  # the first call packs
                assert torch.allclose(copy(pixels), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
            assert torch.equal(plain(pixels), expected)
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())

    def test_bf16_is_near_and_told_in_fp32(self, kind):
        plain, pixels = small(kind), torch.randn(3, 3, 33, 47)
        with torch.inference_mode():
            expected, found = plain(pixels), packed(plain, torch.bfloat16)(pixels)
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).abs().max()) < 0.03 * float(expected.max() - expected.min())


class TestParts:
    def test_this_torch_packs(self):
        assert packs(torch.float32)  # if not, the rest of this file says nothing
        assert not packs(torch.float64)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_an_mlp_with_every_activation(self, activation):
        mlp = Mlp(7, 11, activation=activation).eval()
        holder = nn.Sequential(mlp)
        x = torch.randn(2, 3, 7)
        with torch.inference_mode():
            copy = packed(holder)
            assert torch.allclose(copy(x), mlp(x), atol=1e-6)
        fused = activation in ("gelu", "gelu_tanh", "relu")
        assert isinstance(copy[0], PackedMlp) == fused
        assert type(holder[0]) is Mlp

    def test_weights_can_be_asked_for_before_and_after(self):
        layer = nn.Linear(13, 7)
        copy = PackedLinear(layer, torch.float32)
        assert copy.weight.data_ptr() == layer.weight.data_ptr()
        with torch.inference_mode():
            copy(torch.randn(2, 13))
            assert copy.dense is None
            assert torch.equal(copy.weight, layer.weight)
            assert torch.equal(PackedLinear(layer, torch.bfloat16).weight, layer.weight.bfloat16())

    @pytest.mark.parametrize("key_bias", [True, False])
    def test_attention_written_out_is_the_same(self, key_bias):
        attention = Attention(12, 3, key_bias=key_bias).eval()
        for bias in (attention.q_bias, attention.v_bias, attention.qkv.bias):
            if bias is not None:
                nn.init.normal_(bias)
        query, key = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
        hidden = torch.zeros(2, 1, 1, 7)
        hidden[1, ..., 4:] = -torch.inf
        fused = attention(query), attention(query, key, bias=hidden)
        attention.fused = False
        written = attention(query), attention(query, key, bias=hidden)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(fused, written, strict=True))

    def test_what_learns_in_bf16_has_the_gradients_of_the_kernel(self, monkeypatch):
        attention, query = Attention(12, 3), torch.randn(2, 5, 12)
        bias = torch.randn(1, 3, 5, 5)
        found = []
        for written in (False, True):
            monkeypatch.setattr("sightline.layers.attention.writes_maps_out", lambda *_, now=written: now)
            attention.zero_grad()
            attention(query, bias=bias).square().sum().backward()
            found.append([p.grad.clone() for p in attention.parameters()])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))

    def test_dropout_of_the_map_where_it_is_written_out(self, monkeypatch):
        monkeypatch.setattr("sightline.layers.attention.writes_maps_out", lambda *_: True)
        attention, query = Attention(12, 3, drop=1.0), torch.randn(2, 5, 12)
        assert torch.equal(attention(query), attention.out.bias.expand(2, 5, 12))
        assert not torch.equal(attention.eval()(query), attention.out.bias.expand(2, 5, 12))

    def test_a_map_that_is_too_large_is_not_written_out(self, monkeypatch):
        attention = Attention(12, 3).eval()
        attention.fused = False
        monkeypatch.setattr(Attention, "_map", lambda *_: pytest.fail("it was written out"))
        monkeypatch.setattr("sightline.layers.attention.LARGEST_MAP", 24)
        attention(torch.randn(1, 5, 12))


class TestPredictor:
    def test_packed_answers_are_those_of_the_network(self):
        images = [image(i) for i in range(6)]
        model = predictor(pack=True)
        assert abs(scores(model.predict(images)) - scores(predictor().predict(images))).max() < 1e-6
        assert torch.allclose(model.embed(images), predictor().embed(images), atol=1e-5)
        assert any(isinstance(part, PackedLinear) for part in model.computing.modules())
        assert not any(isinstance(part, PackedLinear) for part in model.network.modules())

    @pytest.mark.parametrize("native", [True, False])
    def test_bf16_is_a_copy_where_the_processor_has_it(self, native, monkeypatch):
        monkeypatch.setattr(predicting, "computes_bf16", lambda: native)
        monkeypatch.setattr(predicting, "packs", lambda dtype: False)
        model = predictor(precision=torch.bfloat16)
        images = [image(i) for i in range(6)]
        assert isinstance(model.computing.backbone, LowBackbone) == native
        assert 0 < abs(scores(model.predict(images)) - scores(predictor().predict(images))).max() < 0.05

    def test_altered_predictors_share_what_is_packed_while_one_is_there(self):
        made = predictor(pack=True)
        assert made.altered(cores=1).altered(pack=True).computing is made.computing
        assert made.altered(pack=False).computing is made.network
        other = made.altered(network=network())
        assert other.computing is not made.computing
        first = weakref.ref(made.computing)
        del made
        gc.collect()
        assert first() is None

    def test_what_this_processor_has_is_known(self):
        assert computes_bf16() in (True, False)
        model = predictor(pack=True, precision=torch.float16)
        assert model.computing is model.network

    def test_as_many_threads_as_told(self):
        seen = []
        model = predictor(cores=3, pack=False)
        model.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        before = torch.get_num_threads()
        list(model.predict([image(0)]))
        assert seen == [3]
        assert torch.get_num_threads() == before

    def test_merged_networks_compute_packed_too(self):
        plain = network(depth=3, image_size=(42, 30), patch_size=(7, 5))
        merged = plain.merged(4).eval()
        pixels = torch.randn(2, 3, 42, 30)
        with torch.inference_mode():
            assert torch.allclose(packed(merged)(pixels), merged(pixels), atol=1e-4)
            assert packed(merged, torch.bfloat16)(pixels).shape == (2, 5)


class TestReaders:
    def test_memory_of_pictures_is_kept_for_the_next(self):
        before = Image.core.get_blocks_max()
        try:
            Image.core.set_blocks_max(0)
            with readers(1) as pool:
                pool.submit(Image.new, "RGB", (5, 3)).result()
            assert Image.core.get_blocks_max() == BLOCKS
            Image.core.set_blocks_max(BLOCKS + 1)  # whoever keeps more goes on to
            readers(1).shutdown()
            assert Image.core.get_blocks_max() == BLOCKS + 1
        finally:
            Image.core.set_blocks_max(before)

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
    @pytest.mark.parametrize(("yielding", "nice"), [(False, 0), (True, LAST)])
    def test_who_yields_is_least_urgent(self, yielding, nice):
        def own() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        mine = own()
        with readers(3, yielding=yielding) as pool:
            assert {pool.submit(own).result() for _ in range(9)} == {max(mine, nice)}
        assert own() == mine

    def test_predictions_are_read_by_threads_that_yield(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            predicting, "readers", lambda *counts, **told: asked.append(told) or readers(*counts, **told)
        )
        assert len(list(predictor().predict([image(0)]))) == 1
        assert asked == [{"yielding": True}]

    def test_each_computes_alone_and_nobody_else_does(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with readers(3) as pool:
                assert {pool.submit(torch.get_num_threads).result() for _ in range(9)} == {1}
            later = []
            other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert (torch.get_num_threads(), later) == (2, [2])
        finally:
            torch.set_num_threads(before)
