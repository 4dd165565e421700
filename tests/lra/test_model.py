"""The classifier: its size, its pooling, its two towers, its patch order."""

import math

import pytest
import torch

from lra.model import build_classifier, patch_order, pool

SMALL = dict(
    dim=64,
    num_layers=2,
    num_heads=2,
    head_dim=32,
    ffn_dim=128,
    dropout=0.1,
    embedding_rows=512,
    max_length=1024,
    pooling="mean_full",
    patch=None,
)
TINY = SMALL | dict(dim=16, head_dim=8, ffn_dim=16, embedding_rows=16, max_length=16, dropout=0.0)


def classifier(sizes: dict, name: str = "softmax", num_classes: int = 10, two_towers: bool = False):
    torch.manual_seed(0)
    return build_classifier(sizes, name, {}, num_classes=num_classes, two_towers=two_towers)


@pytest.mark.parametrize(
    ("task", "sizes", "num_classes", "two_towers", "parameters"),
    [
        ("listops", dict(embedding_rows=32, max_length=2048), 10, False, 209_802),
        ("text", dict(max_length=4096), 2, False, 370_562),
        ("retrieval", dict(max_length=4096), 2, True, 395_138),
        ("image", {}, 10, False, 174_986),
        ("pathfinder", {}, 2, False, 173_954),
    ],
)
def test_the_small_protocol_has_the_published_parameter_counts(task, sizes, num_classes, two_towers, parameters):
    model = classifier(SMALL | sizes, num_classes=num_classes, two_towers=two_towers)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_what_stands_in_the_padding_does_not_exist():
    """Only the length of the padded sequence matters, not the embedding row of the padding token."""
    model = classifier(TINY).eval()
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0]])
    before = model(tokens)
    with torch.no_grad():
        model.encoder.tokens.weight[0] = 100.0
    torch.testing.assert_close(model(tokens), before)


def test_full_mean_pooling_divides_by_the_padded_length_and_real_mean_pooling_by_the_real_one():
    x = torch.tensor([[[2.0], [4.0], [100.0], [100.0]]])
    key_mask = torch.tensor([[True, True, False, False]])
    assert pool(x, key_mask, "mean_full").item() == 6 / 4
    assert pool(x, key_mask, "mean_real").item() == 6 / 2
    assert pool(x, torch.zeros(1, 4, dtype=torch.bool), "mean_real").item() == 0


def test_the_original_code_pools_everything_or_takes_the_first_token():
    x = torch.tensor([[[2.0], [4.0], [100.0], [100.0]]])
    key_mask = torch.tensor([[True, True, False, False]])
    assert pool(x, key_mask, "mean_all").item() == 206 / 4
    assert pool(x, key_mask, "first").item() == pool(x, key_mask, "cls").item() == 2
    with pytest.raises(ValueError, match=r"model\.pooling=median is unknown; use one of mean_full, "):
        pool(x, key_mask, "median")


def test_a_learned_token_stands_before_the_sequence_also_of_nothing_but_padding():
    model = classifier(TINY | {"pooling": "cls", "patch": (2, 2)}).eval()
    assert model.encoder.cls is not None
    assert not model.encoder.cls.any()
    assert model.encoder.positions.weight.shape == (17, 16)
    seen = []
    for core in model.encoder.attentions():
        core.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[3]))
    tokens = torch.randint(1, 16, (2, 16))
    tokens[1] = 0
    out = model(tokens)
    assert [mask.tolist() for mask in seen] == [[[True] * 17, [True] + [False] * 16]] * 2
    assert out.isfinite().all()
    with torch.no_grad():
        model.encoder.cls += 1
    assert not torch.allclose(model(tokens), out)


def test_sinusoidal_positions_are_fixed_and_tell_places_apart():
    model = classifier(TINY | {"positions": "sinusoidal"}).eval()
    table = model.encoder.positions.weight
    assert not table.requires_grad
    slower = 3 * 10000 ** (-2 / 16)
    assert table[3, :4].tolist() == pytest.approx([math.sin(3), math.cos(3), math.sin(slower), math.cos(slower)])
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert not torch.allclose(model(tokens), model(tokens.flip(1)))


def test_the_original_pair_head_has_a_layer_more_and_no_interaction():
    model = classifier(TINY | {"pair_head": "concat", "attention_bias": False}, num_classes=2, two_towers=True)
    assert [tuple(p.shape) for p in model.head.parameters()] == [(16, 32), (16,), (8, 16), (8,), (2, 8), (2,)]
    assert not any("attention.qkv.bias" in name or "attention.out.bias" in name for name, _ in model.named_parameters())
    one = classifier(TINY | {"pair_head": "concat"}, num_classes=2)
    assert len(list(one.head.parameters())) == 4, "one tower keeps the common head"


def test_two_towers_share_one_encoder_and_see_the_signed_difference():
    model = classifier(TINY, num_classes=2, two_towers=True).eval()
    a, b = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[6, 7, 0, 0]])
    features = [model.encoder(t) for t in (a, b)]
    expected = model.head(torch.cat([*features, features[0] * features[1], features[0] - features[1]], dim=-1))
    torch.testing.assert_close(model(torch.stack([a, b], dim=1)), expected)


def test_a_patch_order_visits_a_grid_patch_by_patch():
    assert patch_order(16, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert patch_order(1024, 4, 8)[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 32]
    with pytest.raises(ValueError, match=r"model.patch=\[3, 4\] does not tile"):
        patch_order(1024, 3, 4)


def test_the_patch_order_changes_only_what_a_local_attention_sees():
    tokens = torch.randint(1, 16, (2, 16))
    for name, same in (("softmax", True), ("local", False)):
        outputs = []
        for patch in (None, (2, 2)):
            torch.manual_seed(0)
            options = {"block_size": 4} if name == "local" else {}
            model = build_classifier(TINY | {"patch": patch}, name, options, num_classes=2, two_towers=False).eval()
            outputs.append(model(tokens))
        assert torch.allclose(*outputs, atol=1e-6) is same


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    model = classifier(TINY | {"dropout": 0.5})
    tokens = torch.randint(1, 16, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_the_losses_of_all_layers_add_up():
    model = classifier(TINY, "adamra")
    model(torch.randint(1, 16, (2, 16)))
    layers = [m.auxiliary_loss() for m in model.encoder.attentions()]
    assert len(layers) == 2
    torch.testing.assert_close(model.auxiliary_loss(), layers[0] + layers[1])
    assert classifier(TINY).auxiliary_loss() == 0
