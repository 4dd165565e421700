"""The lens as a command: its mistakes in one line, its rows, its picture, and the layers of a trained cell."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from lra.errors import UserError
from lra.lens.command import main, settings
from lra.lens.measurement import INSTRUMENTS
from lra.lens.picture import Panel, draw, pooled
from lra.lens.table import COLUMNS
from lra.lens.trained import CHECKPOINT, layers, load_model, read_cell
from lra.model import Classifier, build_classifier
from lra.record import FILENAME, SCHEMA, Cell, write_json

SIZES = dict(
    dim=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    ffn_dim=16,
    dropout=0.1,
    embedding_rows=16,
    max_length=40,
    pooling="mean_full",
    patch=None,
)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("attention=softmaxx", "attention=softmaxx is unknown"),
        ("task=listop", "task=listop is unknown"),
        ("length=0", "length=0 is not possible; it must be a positive integer"),
        ("length=4000", "length=4000 is not possible; model.max_length is 2048"),
        ("sequences=two", "sequences=two is not possible"),
        ("scales=[1,0]", "scales=[1,0] is not possible; it must be positive numbers"),
        ("scale", "scale is not key=value"),
        ("cell=results/nowhere", "cell=results/nowhere is no trained cell"),
        ("attention.rates=[2]", "attention.rates is"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argument: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main([argument]) == 2
    written = capsys.readouterr().err
    assert written.startswith(message)
    assert written.count("\n") == 1


def test_an_option_goes_to_the_attentions_that_have_it():
    found = settings(["attention=softmax,mra,mra_s", "attention.blocks_per_row=2,4"])
    assert [setting.label for setting in found] == [
        "softmax",
        "mra (blocks_per_row=2)",
        "mra (blocks_per_row=4)",
        "mra_s (blocks_per_row=2)",
        "mra_s (blocks_per_row=4)",
    ]
    with pytest.raises(UserError, match=r"^attention.rates is an option of none of softmax, mra$"):
        settings(["attention=softmax,mra", "attention.rates=[2,4]"])


def test_a_look_leaves_rows_records_and_a_picture(tmp_path: Path):
    command = ["attention=softmax,adamra", "length=48", "sequences=1", "scales=[0.5,1]", f"results_dir={tmp_path}"]
    assert main([*command, "trainer=cpu"]) == 0
    rows = pd.read_csv(tmp_path / "lens.csv")
    assert list(rows.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert {"queries_at_rate_2", "queries_at_rate_8", "queries_at_rate_32"} <= set(rows.columns)
    assert len(rows) == 2 * 3
    assert rows["entropy"].notna().all()
    assert rows["ms"].notna().sum() == 2
    softmax = rows[rows["attention"] == "softmax"]
    assert softmax["queries_at_rate_2"].isna().all()
    assert (softmax["relative_error"] < 1e-12).all()
    folder = tmp_path / "lens" / "small" / "listops" / "gaussian-48-seed0"
    assert {path.name for path in folder.iterdir()} == {"softmax", "adamra", "lens.png", "lens.svg"}

    assert main([*command, "trainer=cpu", "attention=softmax"]) == 2  # given twice
    assert main(["attention=none", *command[1:], "trainer=cpu"]) == 0
    assert len(pd.read_csv(tmp_path / "lens.csv")) == 3 * 3  # other rows stay


def test_the_script_runs_from_anywhere(tmp_path: Path):
    script = Path(__file__).parents[2] / "scripts" / "lens.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "lens.csv" in done.stdout


# Pictures


def test_a_picture_is_the_same_bytes_for_the_same_numbers(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.softmax(torch.randn(300, 300, generator=generator, dtype=torch.float64), -1)
    point = dict.fromkeys(INSTRUMENTS, 0.5)
    curves = {name: [point, {**point, "softmax_temperature": 2.0}] for name in ("softmax", "lln")}
    for name in ("one", "two"):
        draw(tmp_path / name, "title", [Panel("softmax", "H = 8", matrix, 1 / 300)], curves)
    for suffix in (".png", ".svg"):
        first, second = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("one", "two"))
        assert first == second
        assert len(first) > 1000


def test_pooling_keeps_the_mean_weight():
    matrix = torch.rand(600, 600, dtype=torch.float64)
    assert pooled(matrix).shape == (256, 256)
    uniform = torch.full((600, 600), 1 / 600, dtype=torch.float64)
    torch.testing.assert_close(pooled(uniform), uniform[:256, :256])
    assert pooled(uniform[:100, :100]).shape == (100, 100)


# Trained cells


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier(SIZES, "softmax", {}, num_classes=10, two_towers=False)


def tokens() -> Tensor:
    rows = torch.randint(1, 16, (2, 30), generator=torch.Generator().manual_seed(0))
    rows[1, 20:] = 0
    return rows


def test_layers_are_seen_as_the_model_calls_them():
    model = classifier().eval()
    seen = layers(model, tokens())
    assert len(seen) == 2
    for block, layer in zip(model.encoder.blocks, seen, strict=True):
        assert layer.module is block.attention.core  # pyright: ignore[reportAttributeAccessIssue]
        assert layer.q.shape == (2, 2, 40, 8)
        assert layer.key_mask is not None
        assert layer.key_mask.sum(1).tolist() == [30, 20]
    x = model.encoder.tokens(torch.nn.functional.pad(tokens(), (0, 10))) + model.encoder.positions.weight
    first = model.encoder.blocks[0]
    qkv = first.attention.qkv(first.attention_norm(x)).view(2, 40, 3, 2, 8)  # pyright: ignore
    torch.testing.assert_close(seen[0].k, qkv[:, :, 1].transpose(1, 2))
    assert not seen[0].q.requires_grad
    assert not any(core._forward_pre_hooks for core in model.encoder.attentions())


def test_a_cell_is_loaded_with_its_best_weights(tmp_path: Path):
    model = classifier()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "cell": {"step": 3}}, tmp_path / CHECKPOINT)
    config = {"model": SIZES, "attention": {"name": "softmax", "impl": "auto"}, "task": {"name": "listops"}}
    cell = Cell("softmax", "listops", "small", "demo", 0).to_dict()
    record = {"schema": SCHEMA, "kind": "cell", "status": "interrupted", "cell": cell, "config": config}
    write_json(tmp_path / FILENAME, record)
    loaded, task = load_model(tmp_path, read_cell(tmp_path))
    assert task.name == "listops"
    assert not loaded.training
    torch.testing.assert_close(loaded(tokens()), model.eval()(tokens()))

    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(UserError, match=rf"{CHECKPOINT} cannot be used"):
        load_model(tmp_path, read_cell(tmp_path))
