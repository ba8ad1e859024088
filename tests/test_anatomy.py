"""docs/anatomy.py: what it says of layers whose answers are known, and of a small run."""

import pytest
import torch
from conftest import assert_one_line, load_script

import checkpoint
import train
from kan_layer import KANLayer
from kan_pairs import KANPairLayer

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


def test_facts_about_known_surfaces():
    """A plane, a sum of two tents and a product, of inputs all over [-2, 2] x [-2, 2]."""
    layer = KANPairLayer(2, 3, num_control_points=5, dtype=torch.float64)
    a, b = layer.knots.view(-1, 1), layer.knots.view(1, -1)
    surfaces = torch.stack((2 * a + b, a.abs() + b.abs(), a * b), dim=2).unsqueeze(0)
    layer.set_control_points(surfaces)
    line = torch.linspace(-2, 2, 401, dtype=torch.float64)
    seen = anatomy.look(layer, torch.cartesian_prod(line, line))
    plane, tents, product = 5 * 4 / 3, 2 * (4 / 3 - 1), (4 / 3) ** 2  # variances
    total = plane + tents + product
    assert seen["activity"].square().tolist() == [pytest.approx([plane, tents, product], rel=1.5e-2)]
    shares = {kind: share for kind, (share, _) in seen["fits"].items()}
    assert shares == dict(
        linear=pytest.approx(plane / total, abs=2e-3), additive=pytest.approx((plane + tents) / total, abs=2e-3)
    )
    assert seen["outside"] == 0 and seen["visits"].shape == (1, 16) and seen["visits"].sum() == 401**2
    flat = torch.zeros(5, 5, dtype=torch.float64)
    for kind, last in dict(linear=(flat + 2, flat), additive=(surfaces[0, ..., 1], flat)).items():
        want = torch.stack((surfaces[0, ..., 0], *last), dim=2)
        torch.testing.assert_close(seen["fits"][kind][1].view(5, 5, 3), want, rtol=0, atol=1e-2)
    table = anatomy.pruned(layer, seen, torch.tensor([[False, True, False]])).view(5, 5, 3)
    torch.testing.assert_close(table[..., [0, 2]], surfaces[0][..., [0, 2]])
    torch.testing.assert_close(table[..., 1], flat + 2, rtol=0, atol=1e-2)


def test_what_was_never_visited_does_not_matter():
    """Where there are no inputs, least squares has no answer; what there is is explained all the same."""
    layer = KANPairLayer(2, 1, num_control_points=9, dtype=torch.float64)
    torch.nn.init.normal_(layer.kan_weight)
    layer.set_control_points(layer.control_points().mean(1, keepdim=True).expand_as(layer.kan_weight))  # of b alone
    x = torch.rand(500, 2, dtype=torch.float64) - torch.tensor([2.0, 1.0])
    seen = anatomy.look(layer, x)
    share, fit = seen["fits"]["additive"]
    assert share == pytest.approx(1) and fit.isfinite().all() and (seen["visits"] == 0).any()


@pytest.mark.parametrize("pairs", [False, True])
def test_a_run_is_taken_apart_and_left_as_it_was(tiny, script, pairs):
    options = dict(kan_gate=True, kan_parameterization="whitened", table_learning_rate=1e-2, max_steps=40)
    config = tiny(kan_pairs=pairs, **options)
    train.train(config)
    before = checkpoint.load_model(config.out_dir)[0].state_dict()
    done = script("docs/anatomy.py", config.out_dir)
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in done.stdout.splitlines()}
    assert {"h.0.mlp.proj", "h.1.mlp.proj"} <= rows.keys()
    names = ["every surface a sum of two curves", "every surface a plane"] if pairs else ["every curve a straight line"]
    losses = [float(rows[name][0]) for name in ("as it is", *names, "gates at 1")]
    assert losses[0] < min(losses[1:])
    for row in (rows["h.0.mlp.proj"], rows["h.1.mlp.proj"]):
        shares = [float(share.rstrip("%")) for share in row[5:]]
        assert len(shares) == len(names) and shares[0] > 0 and shares == sorted(shares) and shares[-1] < 100
    # With all activity ordered, taking the least active three quarters hurts less than as many at random.
    least, chance = (float(loss) for loss in rows["75%"])
    assert losses[0] < least < chance
    after = checkpoint.load_model(config.out_dir)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_has_no_splines_is_refused(tiny, script):
    config = tiny(mlp="gelu", max_steps=1)
    train.train(config)
    assert_one_line(script("docs/anatomy.py", config.out_dir), "no curves", "gelu")
