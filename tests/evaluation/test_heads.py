"""Heads: AIM's exactly, stacked copies equal to plain modules trained alone, moments equal to torch's batch norm."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from toto.evaluation.heads import AttentionHead, AverageHead, Moments, RunningMoments, StackedHeads, Standard
from toto.evaluation.probe import Features, ProbeConfig, Probes, best_by_layer, new_head, train_probes
from toto.runtime.seed import stream

GRID = ProbeConfig(rates=(1e-3, 1e-2), decays=(0.0, 0.1), epochs=5, batch=16, heads=2)


def some_features(count: int = 45, *, seed: int = 0, layers: int = 2, width: int = 8) -> Features:
    """Three classes, one of which shows in every layer's tokens, far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    by_layer = {}
    for layer in range(layers):
        states = torch.randn(count, 10, width, generator=generator) * 3 + 5
        states[torch.arange(count), :, labels] += 1.5 * layer
        by_layer[layer] = states
    return Features(by_layer=by_layer, labels=labels)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_head_is_the_mean_of_multi_head_attention_over_its_queries(queries, bias):
    torch.manual_seed(0)
    head = AttentionHead(12, 5, heads=3, queries=queries, qkv_bias=bias)
    tokens = torch.randn(4, 7, 12)
    reference = torch.nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    reference.in_proj_weight.data = torch.cat([torch.eye(12), head.key.weight, head.value.weight])
    if bias:  # a key's bias changes nothing: any will do
        torch.nn.init.normal_(head.value.bias)
        reference.in_proj_bias.data = torch.cat([torch.zeros(12), torch.randn(12), head.value.bias])
    reference.out_proj.weight.data = torch.eye(12)
    pooled, _ = reference(head.query.reshape(1, queries, 12).expand(4, queries, 12), tokens, tokens)
    torch.testing.assert_close(head(tokens), head.linear(pooled.mean(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [
    lambda: AverageHead(12, 5),
    lambda: AverageHead(12, 5, classifier_bias=False),
    lambda: AttentionHead(12, 5, heads=3),
    lambda: AttentionHead(12, 5, heads=3, queries=2, qkv_bias=True, classifier_bias=False),
])  # fmt: skip
def test_stacked_copies_say_what_each_says_alone_of_standardised_tokens(make):
    torch.manual_seed(0)
    stacked = StackedHeads(make(), 4)
    for tensor in stacked.stacked.values():
        tensor.detach().add_(torch.randn_like(tensor) * 0.1)
    tokens = torch.randn(3, 7, 12) * 2 + 1
    standard = Standard(mean=torch.randn(12), deviation=torch.rand(12) + 0.5)
    said = stacked.logits(tokens, standard)
    for copy in range(4):
        alone = stacked.one(copy)((tokens - standard.mean) / standard.deviation)
        torch.testing.assert_close(said[copy], alone, atol=1e-5, rtol=1e-5)


def trained_alone(features, layer, pool, rate, decay, config):
    """A single head by plain modules, torch's optimizer and schedule, on tokens that are standardised beforehand."""
    head = new_head(layer, pool, features.by_layer[layer].shape[2], 3, config)
    tokens, labels = features.by_layer[layer], features.labels
    norm = torch.nn.BatchNorm1d(tokens.shape[2], eps=1e-6, affine=False, momentum=0.1)
    read = tokens if pool == "attention" else tokens.mean(1, keepdim=True)
    if config.standardise == "training-set":
        flat = read.flatten(0, 1)
        norm.running_mean, norm.running_var = flat.mean(0), flat.var(0, correction=0)
        norm.eval()
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)
    steps = config.epochs * math.ceil(len(labels) / config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(config.epochs):
        order = torch.from_numpy(stream(config.seed, "probe order", epoch).permutation(len(labels)))
        for batch in torch.split(order, config.batch):
            normal = norm(read[batch].flatten(0, 1)).view(read[batch].shape)
            optimizer.zero_grad()
            F.cross_entropy(head(normal), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return head, norm


@pytest.mark.parametrize("standardise", ["training-set", "running"])
def test_every_head_of_the_grid_equals_that_head_trained_alone(standardise):
    features, config = some_features(), replace(GRID, standardise=standardise)
    probes = Probes(classes=3, config=config)
    probes.train(features, torch.arange(45))
    assert set(probes.heads) == set(product((0, 1), ("average", "attention")))
    for (layer, pool), heads in probes.heads.items():
        standard = probes.moments[layer, pool].standard()
        for copy, (rate, decay) in enumerate(config.settings):
            alone, norm = trained_alone(features, layer, pool, rate, decay, config)
            torch.testing.assert_close(standard.mean, norm.running_mean, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(standard.deviation, (norm.running_var + 1e-6).sqrt(), atol=1e-6, rtol=1e-6)
            ours = dict(heads.one(copy).named_parameters())
            for name, theirs in alone.named_parameters():
                torch.testing.assert_close(ours[name], theirs, atol=2e-5, rtol=1e-4)


def test_a_grid_of_one_point_gives_the_same_score_as_the_whole_grid():
    train, test = some_features(), some_features(30, seed=1)
    whole = train_probes(train, test, classes=3, config=GRID)
    assert len(whole) == 2 * 2 * 4
    for score in whole[::5]:
        one = replace(GRID, pools=(score.pool,), rates=(score.rate,), decays=(score.decay,))
        layer = Features(by_layer={score.layer: train.by_layer[score.layer]}, labels=train.labels)
        (alone,) = train_probes(
            layer, Features(by_layer={score.layer: test.by_layer[score.layer]}, labels=test.labels),
            classes=3, config=one,
        )  # fmt: skip
        assert (alone.layer, alone.pool, alone.validation) == (score.layer, score.pool, score.validation)
        assert torch.equal(alone.correct, score.correct)
    best = best_by_layer(whole)
    assert [(score.layer, score.pool) for score in best] == list(product((0, 1), ("average", "attention")))
    for score in best:
        same = [other for other in whole if (other.layer, other.pool) == (score.layer, score.pool)]
        assert score.validation == max(other.validation for other in same)


def test_moments_of_parts_are_those_of_the_whole():
    rows = torch.randn(1000, 6) * torch.tensor([1, 10, 0.1, 1, 1, 0]) + torch.tensor([0, 100, 5, -3, 0, 2])
    moments = Moments()
    for part in rows.split([1, 299, 700]):
        moments.add(part)
    found = moments.standard()
    variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
    torch.testing.assert_close(found.mean.double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.deviation.double(), (variance + 1e-6).sqrt(), atol=1e-5, rtol=1e-4)


def test_running_moments_are_those_of_torchs_batch_norm():
    norm, ours = torch.nn.BatchNorm1d(6, eps=1e-6, affine=False), RunningMoments()
    for seed in range(4):
        rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)) * (seed + 1) + seed
        standard = ours.of_batch(rows)
        torch.testing.assert_close((rows - standard.mean) / standard.deviation, norm(rows), atol=1e-5, rtol=1e-5)
    norm.eval()
    final = ours.standard()
    torch.testing.assert_close((rows - final.mean) / final.deviation, norm(rows), atol=1e-5, rtol=1e-5)
