"""asa_ops.integrations: models of transformers, with weights that are drawn."""

import pytest
import torch
import transformers

from asa_ops import asa_attention, nn
from asa_ops.integrations import transformers as integration

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIZE |= {"image_size": 16, "patch_size": 4}
integration.register()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of asa_attention by a model."""
    found = []

    def attend(layer, function, **arguments):
        found.append(arguments | {"layer": type(layer).__name__})
        return function(**arguments)

    monkeypatch.setattr(integration, "attend", attend)
    return found


def vit(**options):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZE, **options, initializer_range=0.5)
    return transformers.AutoModel.from_config(config, attn_implementation="asa").eval()


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 4, "num_labels": 3}
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, **sizes
    )
    config.init_std = config.init_xavier_std = 0.5
    return transformers.AutoModel.from_config(config, attn_implementation="eager")


def segformer():
    two = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    two |= {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(num_encoder_blocks=2, **two, initializer_range=0.5)
    return transformers.AutoModel.from_config(config)


def both(model, *inputs, dense="sdpa", **named):
    """Return all outputs by an implementation of transformers and by "asa"."""
    outs = []
    for implementation in (dense, "asa"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)  # patches that ViTMAE leaves out
        with torch.no_grad():
            outs.append(model(*inputs, **named))
    return outs


@pytest.mark.parametrize("name", integration.EXTRA_TOKENS)
def test_models_of_the_table_start_dense_and_have_these_tokens(name, calls):
    registers = {"num_register_tokens": 3} if name in ("dinov2_with_registers", "dinov3_vit") else {}
    image = {"image_size": [16, 16]} if name == "yolos" else {}
    config = transformers.AutoConfig.for_model(name, **SIZE | registers | image)
    model = transformers.AutoModel.from_config(config).eval()
    expected, found = both(model, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert len(calls) == 2
    for call in calls:
        patches = {"vit_mae": 4, "yolos": 16 + config.to_dict().get("num_detection_tokens", 0)}.get(name, 16)
        assert call["query"].shape[2] - call["extra_tokens"] == patches
        assert call["alpha"] == 0 and "reciprocal" not in call


def test_a_model_of_several_kinds_of_attention(calls):
    """DETR: padding, and cross attention, also where there are as many queries as keys."""
    model = detr().eval()
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 32:] = 0
    expected, found = both(model, torch.randn(2, 3, 64, 64), dense="eager", pixel_mask=mask)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    kinds = {call["layer"]: (call["key"].shape[2], call.get("reciprocal", True)) for call in calls}
    assert kinds == {"DetrSelfAttention": (4, True), "DetrCrossAttention": (5, False)}  # 4 keys, and one more
    assert [call["key_padding_mask"] is not None for call in calls] == [True, False, True]
    expected, found = both(model, torch.randn(1, 3, 64, 96), dense="eager")
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    assert {call["key"].shape[2] for call in calls[3:]} == {4, 6}


def test_fewer_keys_than_queries(calls):
    model = segformer().eval()
    expected, found = both(model, torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert [(x["query"].shape[2], x["key"].shape[2], x.get("reciprocal", True)) for x in calls] == [
        (64, 16, False),
        (16, 16, True),
    ]
    names = integration.add_thresholds(model, 1.0)
    assert [model.get_parameter(f"{name}.asa_alpha").shape for name in names] == [(1,), (2,)]


def test_values_of_the_configuration(calls, tmp_path):
    model = vit(asa_alpha=1.5, asa_beta=2.0, asa_window=[1, 3])
    x = torch.randn(2, 3, 16, 16)
    model(x)
    names = ("alpha", "beta", "window", "grid", "extra_tokens")
    assert [calls[0][name] for name in names] == [1.5, 2.0, [1, 3], (4, 4), 1]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="asa")
    assert torch.equal(again(x)[0], model(x)[0])
    again.config.asa_grid, again.config.asa_extra_tokens = [3, 5], 2
    again(x)
    assert [calls[-1][name] for name in names[3:]] == [(3, 5), 2]
    again.config.asa_grid, again.config.asa_extra_tokens = None, 0
    with pytest.raises(ValueError, match=r"ViTAttention: asa_beta needs asa_grid=\(H, W\) .* of 17 patches"):
        again(x)


def test_a_layer_is_the_op():
    model = vit()
    layer = model.layers[0].attention
    names = integration.add_thresholds(model)
    assert names == ["layers.0.attention", "layers.1.attention"]
    alpha = torch.tensor([0.0, 0.5, 1.0, 2.0])
    model.load_state_dict(model.state_dict() | {"layers.0.attention.asa_alpha": alpha})
    x = torch.randn(2, 17, 32)
    query, key, value = (f(x).unflatten(2, (4, 8)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    out, stats = asa_attention(query, key, value, alpha.view(1, 4, 1), extra_tokens=1, return_stats=True)
    with nn.monitor(model) as watched:
        torch.testing.assert_close(layer(x)[0], layer.o_proj(out.transpose(1, 2).flatten(2)))
        density = watched.statistics()["layers.0.attention/density"]
    assert density == pytest.approx(stats.survivors.float().mean().item() / 17)


def test_thresholds_learn_from_a_dense_start_and_are_saved(tmp_path):
    model = vit()
    x = torch.randn(4, 3, 16, 16)
    expected, found = both(model, x)
    integration.add_thresholds(model)
    assert torch.equal(model(x)[0], found[0])
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    groups = nn.parameter_groups(model, lr=0.0, threshold_rate=1.0)
    thresholds = next(group["params"] for group in groups if group["name"] == "thresholds")
    optimizer = torch.optim.SGD(thresholds, lr=0.02)
    weight = torch.randn(17, 32)
    for _ in range(8):
        optimizer.zero_grad()
        ((weight * model(x)[0]).mean() - 10 * sum(a.mean() for a in thresholds)).backward()
        optimizer.step()
    values = torch.stack([a.detach() for a in thresholds])
    assert values.shape == (2, 4) and (values > 0.2).all()
    assert len(values.unique()) > 2  # each by its own gradient
    with nn.monitor(model) as watched:
        sparse = model(x)[0]
        statistics = watched.statistics()
    assert 0 < statistics["layers.1.attention/density"] < 0.95

    model.save_pretrained(tmp_path)
    again = integration.from_pretrained(transformers.AutoModel, tmp_path)
    assert torch.equal(again(x)[0], sparse)
    assert again.config._attn_implementation == "asa"
    dense = transformers.AutoModel.from_pretrained(tmp_path)  # without them
    assert not hasattr(dense.layers[0].attention, "asa_alpha")
    dense.save_pretrained(tmp_path / "dense")
    begun = integration.from_pretrained(transformers.AutoModel, tmp_path / "dense", alpha=0.25)
    assert begun.layers[1].attention.asa_alpha.tolist() == [0.25] * 4
    schedule = nn.ThresholdSchedule(begun, start=1, stop=3)
    torch.testing.assert_close(begun(x)[0], dense(x)[0], atol=1e-4, rtol=1e-4)
    schedule.remove()
    assert (begun(x)[0] - dense(x)[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_compiled():
    model = vit()
    integration.add_thresholds(model, 0.5)
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_errors_name_the_layer_and_what_to_use():
    layer = vit().layers[0].attention
    x = torch.randn(1, 17, 32)
    causal = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r'ViTAttention: the .*differ.*: use attn_implementation="sdpa"'):
        layer(x, attention_mask=causal)
    with pytest.raises(ValueError, match='ViTAttention: asa has no position_bias: use attn_implementation="sdpa"'):
        layer(x, position_bias=torch.zeros(1, 4, 17, 17))
    layer.is_causal = True
    layer.layer_idx = 3
    with pytest.raises(
        ValueError, match=r'ViTAttention \(layer 3\): causal attention .*: use attn_implementation="sdpa"'
    ):
        layer(x)
    model = vit(attention_probs_dropout_prob=0.1)
    model(torch.randn(1, 3, 16, 16))  # which is evaluated
    with pytest.raises(ValueError, match=r"ViTAttention: .*got dropout=0.1: set attention_probs_dropout_prob"):
        model.train()(torch.randn(1, 3, 16, 16))
    biased = transformers.BeitConfig(**SIZE, use_relative_position_bias=True)
    with pytest.raises(ValueError, match=r"BeitAttention: .*position bias: use attn_implementation="):
        transformers.AutoModel.from_config(biased, attn_implementation="asa")(torch.randn(1, 3, 16, 16))
    text = transformers.CLIPTextConfig(**{key: SIZE[key] for key in SIZE if "size" not in key}, vocab_size=99)
    words = transformers.AutoModel.from_config(text, attn_implementation="asa")
    with pytest.raises(ValueError, match="CLIPAttention: "):
        words(torch.tensor([[1, 2, 3]]))


def test_models_without_the_interface_are_told():
    config = transformers.PvtV2Config(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
    model = transformers.AutoModel.from_config(config, attn_implementation="asa")  # which transformers lets pass
    with pytest.raises(ValueError, match="PvtV2Model has none, and runs its own, dense"):
        integration.add_thresholds(model)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must be >= 0"):
            integration.add_thresholds(vit(), alpha)
