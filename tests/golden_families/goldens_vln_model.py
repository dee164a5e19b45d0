"""ORIST: its network, losses, roll-outs, optimizer and key list against the official code.

`run` takes a case of the vln family and checks it, or returns None for cases about the world. What a case is about is
judged by its content. Tensors lie beside the case in files that begin with its name.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tasks.navigation.agent import A2CConfig, Agent
from tasks.navigation.environment import NavigationEnvironment, Observation
from tasks.navigation.episodes import Episode
from tasks.navigation.features import ViewObjects, boxes_of
from tasks.navigation.graph import Graphs
from tasks.navigation.orist.losses import imitation_losses, room_presence_loss, weighted
from tasks.navigation.orist.network import Options, ORISTNetwork
from tasks.navigation.orist.optim import BertAdamW, linear_schedule, parameter_groups
from tasks.navigation.rooms import Rooms
from tasks.navigation.world import World

HERE = Path(__file__).resolve().parents[1] / "goldens" / "vln"
EXACT, ROLLED_OUT = 1e-9, 1e-6
NAMES = {  # of the losses
    "nav": "action",
    "progress": "progress",
    "angle": "direction",
    "candi_region": "room_presence",
    "next_region": "next_room",
    "target_region": "target_room",
}


def run(meta, tensors, path):
    for mark, check in {
        "loss_parts_per_step": check_network,
        "results": check_network,
        "region_feature_recipe": check_rollouts,
        "grads": check_optimizer,
        "optimizer_groups": check_keys,
    }.items():
        if mark in meta:
            check(meta, path)
            return {}
    return None


def close(actual, expected, tolerance, name):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (actual, expected))
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.0e}"


def find(folder, pattern):
    """Files beside a case, or else among the cases at hand; there may be none of outputs."""
    roots = [Path(root) / "vln" for root in os.environ.get("FRUGAL_GOLDENS", "").split(":") if root]
    for place in (folder, *reversed(roots), HERE):
        if found := sorted(place.glob(pattern)):
            return found
    return []


def load(folder, pattern):
    return {name: tensor for file in find(folder, pattern) for name, tensor in load_file(file).items()}


def build(state, dims, **options):
    network = ORISTNetwork(
        state["uniter.embeddings.word_embeddings.weight"].shape[0],
        feature_dim=dims["img_dim"],
        hidden_dim=dims["hidden"],
        num_layers=1 + max(int(name.split(".")[3]) for name in state if ".layer." in name),
        num_heads=dims.get("heads", 4),
        feedforward_dim=state["uniter.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_positions=state["uniter.embeddings.position_embeddings.weight"].shape[0],
        **options,
    ).double()
    network.load_state_dict(state)  # strict: the official keys
    return network.eval()


# -- network ----------------------------------------------------------------------------------------------------------


def check_network(meta, path):
    weights = {k.removeprefix("sd."): v for k, v in load(path.parent, f"{path.stem}_weights*").items()}
    inputs = load(path.parent, f"{path.stem}_inputs*")
    for kind, result in meta["results"].items():
        expected = load(path.parent, f"{path.stem}_{kind}_out*")
        uses_lstm = result["config"]["use_lstm"]
        state = {k: v for k, v in weights.items() if uses_lstm or not k.startswith("lstm.")}
        network = build(state, meta["dims"], use_lstm=uses_lstm, room_presence="region_pred.fc1.weight" in state)
        choices = [] if uses_lstm else chosen_rows(meta["recurrence"]["nolstm"])
        check_steps(network, inputs, expected, result, meta["dims"], choices)


def chosen_rows(text):
    numbers = text[text.index("[[") : text.rindex("]]") + 2]
    return [[int(n) for n in row.strip("[] ").split(",")] for row in numbers.split("],")]


def check_steps(network, inputs, expected, result, dims, choices):
    batch, memory, total = dims["batch"], None, 0.0
    count = torch.tensor(dims["candidate_leng"])
    start = count.cumsum(0) - count
    for t in range(len(result["loss_parts_per_step"])):
        given = {name.split(".in.")[1]: value for name, value in inputs.items() if name.startswith(f"s{t}.in.")}
        target = {name.split(".tgt.")[1]: value for name, value in inputs.items() if name.startswith(f"s{t}.tgt.")}
        options = Options(
            given["input_ids"][start],
            given["txt_lens"][start],
            given["img_feat"],
            given["img_pos_feat"],
            given["num_boxes"],
            given["orien_feat"],
            count,
        )
        step = network(options, memory)
        seen = observation(count, target)
        check_outputs(network, options, memory, step, seen, t, expected)
        terms = imitation_losses(step, seen)
        if step.room_presence is not None:
            terms["room_presence"] = presence_loss(step.room_presence, seen, target["candi_region"])
        for name, value in result["loss_parts_per_step"][t].items():
            close(weighted(terms) if name == "step_total" else terms[NAMES[name]], value, EXACT, f"s{t} {name}")
        total = total + weighted(terms)
        rows = start + torch.tensor(choices[t]) if choices else start
        memory = network.remember(memory, step, rows, torch.ones(batch, dtype=torch.bool), torch.arange(batch))
    loss = 0.2 * total / batch
    close(loss, result["loss"], EXACT, "loss")
    check_gradients(network, loss, result["grad_norms"], EXACT)


def presence_loss(room_presence, seen, targets):
    """Ended episodes have their own predictions as targets."""
    table = rows_to_table(room_presence.sigmoid(), seen)
    return room_presence_loss(table, torch.where(seen.ended[:, None, None], table.detach(), targets))


def check_gradients(network, loss, norms, tolerance):
    network.zero_grad()
    loss.backward()
    parameters = dict(network.named_parameters())
    largest = max(norms.values())
    for name, norm in norms.items():
        error = abs(float(parameters[name].grad.norm()) - norm)
        assert error <= tolerance * max(norm, 1e-3 * largest), f"{name}: gradient off by {error:.3g}"


def check_outputs(network, options, memory, step, seen, t, expected):
    """Every output that the files hold, of those the network has."""
    uniter = network.uniter
    x, padding = uniter.tokens(options, None if memory is None else memory.state)
    number = options.num_options
    pairs = {
        "encoder_in": x,
        "txt_emb": uniter.embeddings(options.input_ids).repeat_interleave(number, dim=0),
        "img_emb": uniter.img_embeddings(
            options.objects, options.boxes, uniter.embeddings.token_type_embeddings.weight[1]
        ),
        "orien_emb": uniter.orien_embeddings(options.orientation),
    }
    for i, layer in enumerate(uniter.encoder.layers):
        x = layer(x, padding)
        pairs[f"layer{i}"] = x
    pairs |= {
        "pooled": uniter.pooler(x[:, 0]),
        "logit": seen.table(step.scores),
        "rl_logit": seen.table(step.scores),
        "progress": step.progress.sigmoid(),
        "next_region": step.next_room,
        "target_region": step.target_room,
        "critic": step.value[:, None],
        "state": step.memory.state,
        "c1": step.memory.cell,
        "angle": rows_to_table(step.direction, seen),
    }
    if step.room_presence is not None:
        pairs["region"] = rows_to_table(step.room_presence.sigmoid(), seen)
    held = {name.split(".", 1)[1]: value for name, value in expected.items() if name.startswith(f"s{t}.")}
    assert held.keys() <= pairs.keys(), f"nothing computed for {held.keys() - pairs.keys()}"
    for name, value in held.items():
        actual = pairs[name]
        if name.startswith("layer") or name == "encoder_in":  # what padding becomes is of no importance
            actual, value = actual[~padding], value[~padding]
        close(actual, value, EXACT, f"s{t}.{name}")


def rows_to_table(rows, seen):
    table = rows.new_zeros(*seen.mask.shape, rows.shape[1])
    table[seen.mask] = rows
    return table


def observation(count, target):
    """An observation of which the losses' part alone is filled in."""
    mask = torch.arange(int(count.max())) < count[:, None]
    values = dict.fromkeys(Observation.__dataclass_fields__)
    ended = target["action"] == -100
    return Observation(
        **values
        | {
            "num_options": count,
            "mask": mask,
            "ended": ended,
            "teacher": torch.where(ended, -1, target["action"]),
            "direction": target["angle"][mask],
            "next_room": target["next_region"],
            "target_room": target["target_region"],
            "progress": target["progress"],
        }
    )


# -- roll-outs --------------------------------------------------------------------------------------------------------


class Recipe:
    """Objects that the json describes and does not hold."""

    def __init__(self, feature_dim):
        self.feature_dim = feature_dim

    def view(self, scan, viewpoint, view):
        r = np.random.RandomState(zlib.crc32(f"{scan}_{viewpoint}_{view:02d}".encode()) & 0x7FFFFFFF)
        n = r.randint(1, 9)
        features = abs(r.randn(n, self.feature_dim))
        xy = np.sort(r.rand(n, 2, 2), axis=1)
        corners = np.stack([xy[:, 0, 0], xy[:, 0, 1], xy[:, 1, 0], xy[:, 1, 1]], axis=1)
        return ViewObjects(features, boxes_of(corners, "recipe"), [])


def check_rollouts(meta, path):
    weights = {k.removeprefix("sd."): v for k, v in load(path.parent, "orist_tiny_weights*").items()}
    state = {k: v for k, v in weights.items() if not k.startswith("region_pred.")}
    dims = meta["dims"]
    folder = find(path.parent, "connectivity")[0]
    rooms = Rooms(meta["house_panos_gt"])
    world = World(Graphs(folder), Recipe(dims["img_dim"]), rooms=rooms, max_objects=dims["max_bb"])
    episodes = [
        Episode(
            encoded["instr_id"],
            "golden",
            item["scan"],
            tuple(item["path"]),
            item["heading"],
            item["instructions"][0],
            tokens=tuple(encoded["bert_instr_encoding"][: encoded["bert_txt_len"]]),
        )
        for item, encoded in zip(meta["items"], meta["encoded"], strict=True)
    ]
    for run in meta["runs"]:
        stop_feature = np.array(run["initial_stop_feature"])
        env = NavigationEnvironment(world, dims["max_txt_len"], stop_feature=stop_feature, freeze_ended=False)
        agent = Recorded(build(state, dims), run)
        getattr(agent, f"check_{run['feedback']}")(env, episodes)
        assert [taken["instr_id"] for taken in run["trajectory"]] == [episode.id for episode in episodes]


class Recorded(Agent):
    """An agent that checks what it computes in every step, and samples what was sampled."""

    def __init__(self, network, run):
        super().__init__(network, max_actions=run["episode_len"], avoid_visited="submit" in run["name"])
        self.run = run
        self.t = 0

    def judge(self, seen, memory, attend=False):
        step = super().judge(seen, memory, attend)
        golden = self.run["steps"][self.t]
        assert golden["t"] == self.t
        where = f"{self.run['name']} t={self.t}"
        close(seen.table(step.scores), golden["logit"], ROLLED_OUT, where)
        if golden.get("value") is not None:
            close(step.value, golden["value"], ROLLED_OUT, where)
        if golden.get("progress") is not None:
            close(step.progress.sigmoid(), golden["progress"], ROLLED_OUT, where)
        if golden.get("angle") is not None:
            close(rows_to_table(step.direction, seen), golden["angle"], ROLLED_OUT, where)
        self.t += 1
        return step

    def sample(self, log_probs, seen):
        actions = torch.tensor(self.run["steps"][self.t - 1]["action"])
        return torch.where(actions < 0, seen.num_options - 1, actions)

    def check_trajectories(self, env):
        for row, taken in enumerate(self.run["trajectory"]):
            assert env.trajectory(row) == taken["path"], f"{self.run['name']}: {taken['instr_id']}"

    def check_teacher(self, env, episodes):
        loss, terms = self.imitate(env, episodes)
        self.check_trajectories(env)
        close(loss, self.run["loss"], ROLLED_OUT, "imitation")
        for name, value in terms.items():
            key = {v: k for k, v in NAMES.items()}[name]
            close(value, self.run["logs"][f"{key}_loss"], ROLLED_OUT, name)
        check_gradients(self.network, loss, self.run["grad_norms"], ROLLED_OUT)

    def check_sample(self, env, episodes):
        for broadcast, expected in ((True, "loss"), (False, "derived_loss_per_sample_advantage")):
            self.t = 0
            self.a2c = A2CConfig(broadcast=broadcast)
            loss = self.reinforce(env, episodes)
            self.check_trajectories(env)
            close(loss, self.run[expected], ROLLED_OUT, expected)
            if broadcast:
                check_gradients(self.network, loss, self.run["grad_norms"], ROLLED_OUT)

    def check_argmax(self, env, episodes):
        walks = self.walk(env, episodes)
        for t, golden in enumerate(self.run["steps"]):
            if "action" in golden:
                steps = [walk.steps[t] for walk in walks]
                actions = [-1 if step["choice"] == len(step["options"]) else step["choice"] for step in steps]
                assert actions == golden["action"], f"{self.run['name']} t={t}"
        for walk, taken in zip(walks, self.run["trajectory"], strict=True):
            assert walk.trajectory == taken["path"], f"{self.run['name']}: {taken['instr_id']}"


# -- optimizer and keys -----------------------------------------------------------------------------------------------


def check_optimizer(meta, path):
    first = meta["trace"][0]
    p1, p2 = (torch.nn.Parameter(torch.tensor(first[name], dtype=torch.float64)) for name in ("p1", "p2"))
    lr = meta["base_lr"]
    optimizer = BertAdamW([{"params": [p1], "lr": 10 * lr}, {"params": [p2], "weight_decay": 0.0}], lr=lr)
    schedule = linear_schedule(optimizer, meta["warmup_steps"], meta["total_steps"])
    for (g1, g2), golden in zip(meta["grads"], meta["trace"][1:], strict=True):
        p1.grad, p2.grad = torch.tensor(g1, dtype=torch.float64), torch.tensor(g2, dtype=torch.float64)
        close(torch.nn.utils.clip_grad_norm_([p1, p2], 2.0), golden["total_norm"], EXACT, "norm")
        close(optimizer.param_groups[1]["lr"], golden["lr"], EXACT, "lr")
        optimizer.step()
        schedule.step()
        close(p1, golden["p1"], EXACT, "p1")
        close(p2, golden["p2"], EXACT, "p2")


def check_keys(meta, path):
    for task, facts in meta["tasks"].items():
        with torch.device("meta"):
            network = ORISTNetwork(facts["config"]["vocab_size"])
        state = network.state_dict()
        keys = {**meta["keys"], "uniter.embeddings.word_embeddings.weight": facts["word_embedding"]}
        assert {name: list(tensor.shape) for name, tensor in state.items()} == keys, task
        assert len(state) == facts["n_keys"]
        assert sum(tensor.numel() for tensor in state.values()) == facts["n_params"]
    with torch.device("meta"):
        optional = ORISTNetwork(100, room_presence=True).state_dict()
    assert {name: list(optional[name].shape) for name in meta["optional_heads"]} == meta["optional_heads"]
    check_groups(network, meta["optimizer_groups"])


def check_groups(network, groups):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    expected = {}
    for group, members in groups.items():
        part, decay = group.split("/")
        expected |= dict.fromkeys(members, (1.0 if part == "body" else 10.0, 0.01 if decay == "decay" else 0.0))
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network, 1.0, 0.01, dict.fromkeys(network.head_names, 10.0))
        for parameter in group["params"]
    }
    unused = {"uniter.img_embeddings.mask_embedding.weight"}  # never has a gradient, so it never moves
    assert found == {name: value for name, value in expected.items() if name not in unused}
