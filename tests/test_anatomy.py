"""docs/anatomy.py: what it says of layers whose answers are known, and of a small run."""

import pytest
import torch
from conftest import assert_one_line, load_script

import checkpoint
import train
from kan_layer import KANLayer

anatomy = load_script("docs/anatomy.py")


def known_layer():
    """Two edges of one input: a straight line, and a tent over [-2, 2], of which no line explains anything."""
    layer = KANLayer(1, 2, num_control_points=5, dtype=torch.float64)
    layer.set_control_points(torch.tensor([[-2.0, 0], [-1, 0], [0, 1], [1, 0], [2, 0]]).double().unsqueeze(0))
    return layer, torch.linspace(-2, 2, 4001, dtype=torch.float64).unsqueeze(1)


def test_facts_about_known_curves():
    layer, x = known_layer()
    seen = anatomy.look(layer, x)
    line, tent = (
        4 / 3,
        4 / 24 * 1.0 - 1 / 16,
    )  # variances: uniform on [-2, 2]; E t^2 - (E t)^2 = (2 / 3) / 4 - (1 / 4)^2
    torch.testing.assert_close(seen["activity"], torch.tensor([[line, tent]]).double().sqrt(), rtol=2e-3, atol=0)
    assert seen["fits"]["linear"][0] == pytest.approx(line / (line + tent), abs=1e-3)
    assert seen["outside"] == 0 and seen["visits"].sum() == 4001 and (seen["visits"] - 1000).abs().max() <= 1
    torch.testing.assert_close(seen["means"], torch.tensor([[[0.0, 0.25]]]).double(), rtol=0, atol=1e-3)
    straight = torch.stack((layer.knots, torch.full((5,), 0.25, dtype=torch.float64)), dim=1).unsqueeze(0)
    torch.testing.assert_close(seen["fits"]["linear"][1], straight, rtol=0, atol=2e-3)
    assert anatomy.look(layer, torch.tensor([[-3.0], [0], [1], [5]], dtype=torch.float64))["outside"] == 0.5


def test_pruned_edges_are_their_means():
    layer, x = known_layer()
    seen = anatomy.look(layer, x)
    table = anatomy.pruned(layer, seen, torch.tensor([[False, True]]))
    assert (table[0, :, 0] == layer.knots).all() and (table[0, :, 1] == seen["means"][0, 0, 1]).all()


def test_a_run_is_taken_apart_and_left_as_it_was(tiny, script):
    config = tiny(kan_gate=True, kan_parameterization="whitened", table_learning_rate=1e-2, max_steps=40)
    train.train(config)
    before = checkpoint.load_model(config.out_dir)[0].state_dict()
    done = script("docs/anatomy.py", config.out_dir)
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in done.stdout.splitlines()}
    assert {"h.0.mlp.proj", "h.1.mlp.proj"} <= rows.keys()
    losses = [float(rows[name][0]) for name in ("as it is", "every curve a straight line", "gates at 1")]
    assert losses[0] < min(losses[1:])
    # With all activity ordered, taking the least active three quarters hurts less than as many at random.
    least, chance = (float(loss) for loss in rows["75%"])
    assert losses[0] < least < chance
    after = checkpoint.load_model(config.out_dir)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_has_no_splines_is_refused(tiny, script):
    config = tiny(mlp="gelu", max_steps=1)
    train.train(config)
    assert_one_line(script("docs/anatomy.py", config.out_dir), "no curves", "gelu")
