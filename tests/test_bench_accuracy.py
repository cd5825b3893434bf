"""The accuracy benchmark: mergers and rivals against their formulas, and one run with models that can do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import accuracy, mergers, surgery
from featcal_fast import demo

TINY = demo.Config(layers=1, width=16, base_steps=2, expert_steps=2, batch_size=4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_pool() -> mergers.Pool:
    models = []
    for seed in range(3):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        with torch.no_grad():
            for place, parameter in enumerate(model.parameters()):
                parameter.copy_(random(*parameter.shape, seed=10 * seed + place))
        models.append(model)
    return mergers.Pool(models[0], {"a": models[1], "b": models[2]})


def test_ties_by_hand() -> None:
    vectors = torch.tensor([[4.0, -3.0, 0.1, 2.0], [2.0, 5.0, -0.1, 0.2]])
    # Half is kept: [4, -3, 0, 0] and [2, 5, 0, 0]. Elected: +, +. The mean of those that agree: (4 + 2) / 2, and 5.
    assert mergers.ties_vector(vectors, 0.5).tolist() == [3, 5, 0, 0]
    assert mergers.ties_vector(vectors, 0.25).tolist() == [4, 5, 0, 0]


def test_ties_of_equal_experts_is_the_trimmed_expert() -> None:
    pool = linear_pool()
    pool = mergers.Pool(pool.base, {"a": pool.experts["a"], "b": pool.experts["a"]})
    for name, value in mergers.ties(pool, mergers.Ties(keep=1.0)).items():
        torch.testing.assert_close(value, pool.experts["a"].get_parameter(name).detach())


def test_average_and_task_arithmetic() -> None:
    pool = linear_pool()
    base, a, b = (mergers.state(model)["0.weight"] for model in (pool.base, *pool.experts.values()))
    torch.testing.assert_close(mergers.average(pool)["0.weight"], (a + b) / 2)
    torch.testing.assert_close(mergers.task_arithmetic(pool)["0.weight"], base + 0.3 * (a + b - 2 * base))


def test_wudi_of_a_rate_for_each_shape() -> None:
    """Adam's first step is the rate: a share of the root mean square of the task vectors of a shape."""
    pool = linear_pool()
    moved = mergers.wudi(pool, mergers.Wudi(steps=1, share=0.01))
    base, vectors = mergers.state(pool.base), mergers.task_vectors(pool)
    for name in ("0.weight", "1.weight"):
        step = moved[name] - base[name] - vectors[name].sum(0)
        rate = 0.01 * vectors[name].square().mean().sqrt()
        torch.testing.assert_close(step.abs(), rate.expand_as(step), rtol=1e-3, atol=0)


def test_wudi_merges_other_parameters_by_the_mean() -> None:
    pool = linear_pool()
    merged, mean = mergers.wudi(pool), mergers.average(pool)
    torch.testing.assert_close(merged["0.bias"], mean["0.bias"])
    assert not torch.allclose(merged["0.weight"], mean["0.weight"])


def test_adamerging_lowers_the_entropy() -> None:
    models = []
    for seed in range(3):
        config = demo.Config(seed=seed, layers=1, width=16)
        models.append(demo._new_model(config).eval())
    heads, images = {"a": random(3, 16), "b": random(3, 16, seed=1)}, {"a": random(8, 1, 8, 8), "b": random(8, 1, 8, 8)}
    pool = mergers.Pool(models[0], {"a": models[1], "b": models[2]}, heads, images)

    def entropy(state: mergers.State) -> float:
        found = accuracy.features(mergers.with_state(pool.base, state), images)
        said = [(20 * mergers.class_scores(f, h)).softmax(-1) for f, h in zip(found, heads.values(), strict=True)]
        return sum(torch.special.entr(p).sum(-1).mean().item() for p in said)

    start = mergers.adamerging(pool, mergers.AdaMerging(steps=0))
    torch.testing.assert_close(start, mergers.task_arithmetic(pool, 0.3))
    assert entropy(mergers.adamerging(pool, mergers.AdaMerging(steps=20, learning_rate=0.01))) < entropy(start)


@pytest.mark.parametrize("kind", surgery.MODULES)
def test_surgery_takes_features_to_the_experts(kind: str) -> None:
    given = random(2, 64, 16)
    shift = random(2, 1, 16, seed=1)
    module = surgery.train(kind, given, given + shift, seed=0, training=surgery.Training(steps=300))
    with torch.no_grad():
        distance = (module(given) - given - shift).abs().mean((1, 2))
        before = shift.abs().mean((1, 2))
    assert (distance < before / 2).all()


def test_surgery_of_one_task_does_not_depend_on_another() -> None:
    given, targets = random(2, 8, 16), random(2, 8, 16, seed=1)
    others, short = torch.stack([targets[0], -targets[1]]), surgery.Training(steps=50)
    found = surgery.train("Surgery", given, targets, seed=0, training=short)(given)[0]
    again = surgery.train("Surgery", given, others, seed=0, training=short)(given)[0]
    torch.testing.assert_close(found, again)


def test_prob_surgery_starts_as_no_change_and_loses_by_its_noise() -> None:
    given = random(2, 8, 16)
    module = surgery.ProbSurgery(2, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(given), given)
    # mu and logvar are 0: |eps| remains, 0.8 in the mean; the divergence from N(0, 1) is 0
    torch.testing.assert_close(module.loss(given, given), torch.full((2,), 0.8), atol=0.15, rtol=0)


def test_run(tmp_path: Path) -> None:
    samples = {"task arithmetic": [8, 16], "simple average": [8]}
    training = surgery.Training(steps=20)
    results = accuracy.run(2, samples, "held-out", tmp_path / "models", TINY, training)
    json.dumps(results)
    cells = accuracy.means(results["rows"])
    assert all(len(values) == 2 for values in cells.values())
    assert len(cells) == 1 + (1 + 2 * 3) + (1 + 3)
    assert all(0 <= value <= 100 for values in cells.values() for value in values)
    assert "  + ProbSurgery" in accuracy.show(results)
    accuracy.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

    again = accuracy.run(1, samples, "held-out", tmp_path / "models", TINY, training)
    first = [row["accuracy"] for row in results["rows"] if row["seed"] == 0]
    assert [row["accuracy"] for row in again["rows"]] == first


def test_leads_say_what_does_not_hold() -> None:
    def row(repair: str, samples: int | None, value: float) -> accuracy.Row:
        return {"merger": "task arithmetic", "repair": repair, "samples": samples, "accuracy": {"upright": value}}

    rows = [row("plain", None, 50.0), row("FeatCal", 8, 60.0), row("FeatCal", 16, 65.0)]
    rows += [
        row("Surgery", 8, 55.0),
        row("Surgery", 16, 70.0),
        row("ProbSurgery", 8, 50.0),
        row("ProbSurgery", 16, 64.0),
    ]
    assert accuracy.leads(rows) == [
        "FeatCal over plain on task arithmetic: 8: +10.0 (1 of 1 seeds), 16: +15.0 (1 of 1 seeds)",
        "FeatCal over Surgery on task arithmetic: 8: +5.0 (1 of 1 seeds), 16: -5.0 (0 of 1 seeds)",
        "FeatCal over ProbSurgery on task arithmetic: 8: +10.0 (1 of 1 seeds), 16: +1.0 (1 of 1 seeds)",
    ]
