"""ORIST's network, losses and optimizer beyond what the goldens fix."""

import pytest
import torch

from tasks.core.errors import UserError
from tasks.navigation.orist.losses import a2c_loss, discounted_returns
from tasks.navigation.orist.network import Memory, Options, ORISTNetwork, mean_of_neighbours
from tasks.navigation.orist.optim import BertAdamW, linear_factor, linear_schedule, parameter_groups

COUNTS = torch.tensor([3, 2, 4])


def make_network(**options):
    torch.manual_seed(0)
    small = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "max_positions": 12}
    return ORISTNetwork(30, feature_dim=6, num_rooms=5, **small | options).double().eval()


def make_options(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = int(COUNTS.sum())
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Options(
        torch.randint(1, 30, (3, 9), generator=generator),
        torch.tensor([9, 4, 6]),
        draw(rows, 4, 6),
        draw(rows, 4, 7),
        torch.randint(1, 5, (rows,), generator=generator),
        draw(rows, 4),
        COUNTS,
    )


def test_padding_and_other_episodes_do_not_matter():
    network, options = make_network(), make_options()
    memory = Memory(torch.rand(3, 16).double(), torch.rand(3, 16).double())
    together = network(options, memory)
    start = 0
    for b, count in enumerate(COUNTS.tolist()):
        rows = slice(start, start + count)
        most, words = int(options.num_objects[rows].max()), int(options.text_length[b])
        alone = Options(
            options.input_ids[b : b + 1, :words],
            options.text_length[b : b + 1],
            options.objects[rows, :most],
            options.boxes[rows, :most],
            options.num_objects[rows],
            options.orientation[rows],
            COUNTS[b : b + 1],
        )
        step = network(alone, Memory(memory.state[b : b + 1], memory.cell[b : b + 1]))
        torch.testing.assert_close(step.scores, together.scores[rows])
        torch.testing.assert_close(step.memory.state[0], together.memory.state[b])
        start += count


def test_the_order_of_objects_does_not_matter():
    network, options = make_network(), make_options()
    options = options._replace(num_objects=torch.full((9,), 4))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = options._replace(objects=options.objects[:, order], boxes=options.boxes[:, order])
    torch.testing.assert_close(network(shuffled).scores, network(options).scores)


@pytest.mark.parametrize("use_lstm", [True, False])
def test_the_memory_takes_the_place_of_the_first_word(use_lstm):
    network, options = make_network(use_lstm=use_lstm), make_options()
    step = network(options)
    rows, everyone = torch.tensor([1, 3, 8]), torch.arange(3)
    moved = torch.tensor([True, False, True])
    memory = network.remember(None, step, rows, moved, everyone)
    state = step.memory.state if use_lstm else step.memory.state[rows]
    torch.testing.assert_close(memory.state[moved], state[moved])
    assert not memory.state[1].any()
    first = options._replace(input_ids=options.input_ids.index_fill(1, torch.tensor([0]), 7))
    assert not torch.allclose(network(first).scores, step.scores)
    torch.testing.assert_close(network(first, memory).scores, network(options, memory).scores)
    later = network.remember(memory, network(options, memory), rows, torch.zeros(3, dtype=torch.bool), everyone)
    torch.testing.assert_close(later.state, memory.state)


def test_computing_the_first_token_alone_changes_nothing():
    network, options = make_network(), make_options()
    x, padding = network.uniter.tokens(options, None)
    for layer in network.uniter.encoder.layers:
        before, x = x, layer(x, padding)
    first, read = network.uniter.encoder(network.uniter.tokens(options, None)[0], padding)
    torch.testing.assert_close(first, x[:, 0])
    torch.testing.assert_close(read, before)


def test_attention_to_objects_is_that_of_the_last_layer():
    network, options = make_network(num_layers=1), make_options()
    attended = network(options, attend=True).attended
    number = torch.arange(4)
    assert not attended[number >= options.num_objects[:, None]].any()
    assert (attended[number < options.num_objects[:, None]] > 0).all()
    x, padding = network.uniter.tokens(options, None)
    attention = network.uniter.encoder.layers[0].attention
    attention.projections.value.weight.data.copy_(torch.eye(16))
    attention.projections.value.bias.data.zero_()
    attention.output.dense.weight.data.copy_(torch.eye(16))
    weights = attention.first_token_weights(x, padding)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(9).double())
    words = options.text_length.repeat_interleave(COUNTS)
    for row in range(9):
        inside = weights[row, words[row] : words[row] + options.num_objects[row]]
        torch.testing.assert_close(attended[row, : len(inside)], inside)


def test_the_mean_leaves_out_stopping():
    pooled = torch.arange(6.0)[:, None]
    mean = mean_of_neighbours(pooled, torch.tensor([3, 1, 2]))
    assert mean[:, 0].tolist() == [0.5, 0.0, 4.0]  # the second has no neighbour


def test_dropout_is_for_training():
    network, options = make_network(), make_options()
    torch.testing.assert_close(network(options).scores, network(options).scores)
    network.train()
    assert not torch.allclose(network(options).scores, network(options).scores)


def test_returns_are_discounted():
    returns = discounted_returns(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([0.0, 4.0]), 0.5)
    assert returns.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_advantages_are_of_each_episode():
    generator = torch.Generator().manual_seed(0)
    log_probs, entropies, values, returns = torch.rand(4, 3, 2, generator=generator, dtype=torch.float64)
    live = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).double()
    expected = 0.0
    for t in range(3):
        for b in range(2):
            advantage = returns[t, b] - values[t, b]
            expected += live[t, b] * (-log_probs[t, b] * advantage + 0.5 * advantage**2 - 0.01 * entropies[t, b])
    loss = a2c_loss(log_probs, entropies, values, returns, live)
    torch.testing.assert_close(loss, expected / 4 / 2)
    official = a2c_loss(log_probs, entropies, values, returns, live, broadcast=True)
    assert not torch.allclose(official, loss)
    one = [x[:, :1] for x in (log_probs, entropies, values, returns, live)]
    torch.testing.assert_close(a2c_loss(*one, broadcast=True), a2c_loss(*one))


def test_the_schedule_rises_falls_and_ends_at_its_floor():
    assert [linear_factor(t, 2, 6) for t in (1, 2, 4, 6)] == [0.5, 1.0, 0.5, 0.0]
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = BertAdamW([parameter], lr=1.0)
    schedule = linear_schedule(optimizer, 2, 4, lowest=0.25)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.5, 1.0, 0.5, 0.25, 0.25, 0.25]
    with pytest.raises(UserError, match=r"warmup_steps.*at most the 4 updates"):
        linear_schedule(optimizer, 5, 4)


def test_weights_without_gradient_do_not_decay():
    moved, still = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = BertAdamW([moved, still], lr=0.1, weight_decay=0.5)
    moved.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moved[1].item() == pytest.approx(0.95)
    assert moved[0].item() < 0.9


def test_groups_name_prefixes_that_fit_nothing():
    with pytest.raises(UserError, match="lr_multipliers: 'heads' was given"):
        parameter_groups(make_network(), 1.0, 0.01, {"heads": 10.0})
