"""LightningModule of ORIST: roll-outs in training, walks in evaluation, submissions from predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tasks.core.errors import expect
from tasks.core.evaluation import all_gather
from tasks.core.files import write_atomically
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig
from tasks.core.report import ReportParts
from tasks.navigation.agent import A2CConfig, Agent
from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import EVALUATORS, Evaluator
from tasks.navigation.metrics import NavigationMetrics
from tasks.navigation.orist.network import ORISTNetwork
from tasks.navigation.orist.optim import BertAdamW, linear_schedule, parameter_groups
from tasks.navigation.weights import load_weights

HEADLINES = {"r2r": "SR", "reverie": "SR", "ndh": "GP"}


class NavigationModule(TaskModule):
    """What networks that navigate share: evaluation by split, predictions and the parts of the report.

    Metrics are named after the split, e.g. ``val_unseen/SR``, in validation and test alike.
    """

    task = "navigation"
    monitor = "val_unseen/SR"
    from_data: ClassVar[Mapping[str, str]] = {
        name: name for name in ("vocab_size", "feature_dim", "num_rooms", "dataset")
    }
    network: ORISTNetwork

    def __init__(self, dataset: str, optim: OptimConfig | dict[str, Any] | None, ema_decay: float | None) -> None:
        super().__init__(optim, ema_decay)
        expect("model.dataset", dataset, dataset in HEADLINES, f"one of {', '.join(HEADLINES)}")
        self.monitor = f"val_unseen/{HEADLINES[dataset]}"  # type: ignore[misc]
        self.metrics = nn.ModuleDict({f"{stage}_metrics": NavigationMetrics() for stage in ("val", "test")})
        self._last: NavigationMetrics | None = None

    @property
    def data(self) -> Any:
        """The datamodule of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def walk(self, episodes: list[Episode]) -> dict[str, dict[str, Any]]:
        """Records of finished episodes by key: `trajectory`, `object` and `steps`."""
        raise NotImplementedError

    def evaluation_step(self, batch: list[Episode], stage: str) -> None:
        """Walk through one batch of episodes, of any splits."""
        self.metrics_of(stage).update(self.walk(batch))

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """The figures of each split, named ``<split>/<figure>``."""
        metrics = self.metrics_of(stage)
        metrics.evaluators = self._evaluators(metrics)
        results = metrics.compute()
        metrics.reset()
        self._last = metrics
        return dict(results)

    def metrics_of(self, stage: str) -> NavigationMetrics:
        """The metrics of a stage, `val` or `test`."""
        return cast(NavigationMetrics, self.metrics[f"{stage}_metrics"])

    def _evaluators(self, metrics: NavigationMetrics) -> dict[str, Evaluator]:
        """What scores each split; in Lightning's sanity check and with limited batches, the part of it at hand."""
        walked = {key for part in all_gather(sorted(metrics.records)) for key in part}
        evaluators: dict[str, Evaluator] = {}
        for split in sorted({key.partition("/")[0] for key in walked}):
            episodes = self.data.samples(split)
            own = [episode for episode in episodes if episode.key in walked]
            known = metrics.evaluators.get(split)
            if known is None or len(own) != len(known.episodes):
                known = EVALUATORS[self.data.dataset](own, self.data.graphs, self.data.definition)
            evaluators[split] = known
        return evaluators

    def _log_results(self, stage: str) -> None:
        for name, value in self.evaluation_results(stage).items():
            # every process computed the same value from the same records
            exact = torch.as_tensor(value, dtype=torch.float64, device="cpu").to(self.device, self._log_dtype)
            self.log(name, exact, prog_bar=name == self.monitor)

    def predict_step(self, batch: list[Episode], batch_idx: int) -> dict[str, dict[str, Any]]:
        """Trajectory and object of each episode by key."""
        records = self.walk(batch)
        return {key: {name: record[name] for name in ("trajectory", "object")} for key, record in records.items()}

    def prediction_files(self, records: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """The file that the leaderboard of the data set takes."""
        yield self.data.submission_file(self.data.predict_split, records)

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and write the walks as a leaderboard takes them, into the run folder."""
        super().on_test_epoch_end()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asks all processes
        if self.trainer.is_global_zero and self._last is not None:
            name, content = self.data.submission_file(self.data.test_split, self._last.gathered)
            write_atomically(folder / name, content)
            print(f"submission: {folder / name}", flush=True)

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Tables by scan and path length, maps of the best and worst episodes and their steps."""
        if self._last is None:
            return ReportParts()
        from tasks.navigation.report import navigation_report  # draws, which training does not need

        data: Any = datamodule
        found = self._last.evaluations
        episodes = {episode.key: episode for split in found for episode in data.samples(split)}
        return navigation_report(found, self._last.gathered, episodes, data.graphs)

    def example_input(self) -> Tensor:
        """Word pieces of one instruction of full length, which stand for one option."""
        return torch.ones(1, self.data.max_text, dtype=torch.int64, device=self.device)


class ORIST(NavigationModule):
    """ORIST (ICCV 2021, arXiv 2104.04167): a BERT reads instruction, objects and orientation of every option.

    The defaults are the published model. `reinforced` episodes of each batch are trained by actor-critic, the others by
    imitation.

    Args:
        vocab_size: Number of word pieces; the command line takes it, and the next three, from the data.
        feature_dim: Size of an object's feature.
        num_rooms: Number of room classes.
        dataset: `r2r`, `reverie` or `ndh`; the headline is SR, for NDH it is GP.
        weights: Official checkpoint, UNITER or BERT to start from, or a checkpoint of ours.
        hidden_dim: Width.
        num_layers: Layers of the encoder.
        num_heads: Attention heads.
        feedforward_dim: Hidden width of the feed-forward networks.
        max_positions: Longest instruction that can be represented, in word pieces.
        dropout: After embeddings, attention and feed-forward networks.
        attention_dropout: Of attention weights.
        feature_dropout: Of object features; 0.5, for REVERIE 0.3.
        use_lstm: Remember through an LSTM.
        initializer_range: Standard deviation of the initial weights.
        use_instruction: False trains and evaluates a blind agent, to see what the instruction is worth.
        max_actions: Steps after which an episode is over.
        reinforced: Share of each batch that is trained by actor-critic.
        a2c: Reward and loss of these.
        beam_width: Walks followed at once in evaluation; 1 is greedy, as published.
        avoid_visited: Never return to a viewpoint in evaluation.
        freeze_ended: Let nobody move who has stopped; in the official code an episode may go on.
        relative_elevation: Give elevations relative to the agent's; the published model has absolute ones.
        bert_optimizer: Optimizer, groups and schedule of the official code: `optim` gives lr, weight_decay, betas,
            lr_multipliers, warm-up, clip_grad and min_lr. Otherwise all of `optim` counts.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    def __init__(
        self,
        vocab_size: int,
        feature_dim: int,
        num_rooms: int,
        dataset: Literal["r2r", "reverie", "ndh"],
        weights: str | None = None,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_dim: int = 3072,
        max_positions: int = 512,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        feature_dropout: float = 0.5,
        use_lstm: bool = True,
        initializer_range: float = 0.02,
        use_instruction: bool = True,
        max_actions: int = 10,
        reinforced: float = 0.5,
        a2c: A2CConfig | dict[str, Any] | None = None,
        beam_width: int = 1,
        avoid_visited: bool = True,
        freeze_ended: bool = True,
        relative_elevation: bool = False,
        bert_optimizer: bool = True,
        optim: OptimConfig | dict[str, Any] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__(dataset, optim, ema_decay)
        self.remember_hyperparameters(locals())
        expect("model.max_actions", max_actions, max_actions >= 1, "at least 1")
        expect("model.beam_width", beam_width, beam_width >= 1, "at least 1")
        expect("model.reinforced", reinforced, 0 <= reinforced <= 1, "a share from 0 to 1")
        expect("model.num_heads", num_heads, hidden_dim % num_heads == 0, f"a divisor of hidden_dim ({hidden_dim})")
        self.network = ORISTNetwork(
            vocab_size,
            feature_dim,
            num_rooms,
            hidden_dim,
            num_layers,
            num_heads,
            feedforward_dim,
            max_positions,
            dropout,
            attention_dropout,
            feature_dropout,
            use_lstm,
            initializer_range,
        )
        if weights:
            rank_zero_info(str(load_weights(self.network, weights)))
        if bert_optimizer:
            linear = self.optim.schedule == "poly" and self.optim.power == 1.0
            expect("optim.schedule", self.optim.schedule, linear, "'poly' with power 1, which bert_optimizer follows")
        self.bert_optimizer = bert_optimizer
        self.reinforced = reinforced
        self.beam_width = beam_width
        self._options = {"freeze_ended": freeze_ended, "relative_elevation": relative_elevation}
        a2c = a2c if isinstance(a2c, A2CConfig) else A2CConfig(**(a2c or {}))
        self.agent = Agent(self.network, max_actions, a2c, avoid_visited, use_instruction)

    # -- optimisation -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The official optimizer and schedule, or those of `optim`."""
        if not self.bert_optimizer:
            return super().configure_optimizers()
        config, total = self._optim_of_this_training(), self.trainer.estimated_stepping_batches
        groups = parameter_groups(self.network, config.lr, config.weight_decay, config.lr_multipliers)
        optimizer = BertAdamW(groups, config.lr, config.betas or (0.9, 0.98))
        schedule = linear_schedule(optimizer, config.warmup_steps, int(total), config.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Count an update."""
        if isinstance(scheduler, LambdaLR):
            scheduler.step()
        else:
            super().lr_scheduler_step(scheduler, metric)

    def training_step(self, batch: list[Episode], batch_idx: int) -> Tensor:
        """The loss of one part of the batch by imitation and of the other by actor-critic."""
        rewarded = round(self.reinforced * len(batch))
        imitated, rest = batch[: len(batch) - rewarded], batch[len(batch) - rewarded :]
        # with a gradient of zero for heads that one part alone, or a short episode, leaves unused
        loss = 0.0 * torch.stack([p.sum() for name in self.network.head_names for p in self._parameters_of(name)]).sum()
        if imitated:
            imitation, terms = self.agent.imitate(self._training_environment(len(imitated)), imitated)
            loss = loss + imitation
            self.log("train/loss_imitation", imitation, batch_size=len(imitated))
            for name, term in terms.items():
                self.log(f"train/sum_{name}", term, batch_size=len(imitated))
        if rest:
            reward = self.agent.reinforce(self._training_environment(len(rest)), rest)
            loss = loss + reward
            self.log("train/loss_a2c", reward, batch_size=len(rest))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return self.with_loss_terms(loss)

    def _parameters_of(self, name: str) -> list[Tensor]:
        return list(self.network.get_submodule(name).parameters())

    def _training_environment(self, count: int) -> NavigationEnvironment:
        """An environment whose first option to stop shows something else in every episode."""
        drawn = torch.rand(count, self.data.feature_dim).numpy()
        environment: NavigationEnvironment = self.data.environment(stop_feature=drawn, **self._options)
        return environment

    # -- evaluation -------------------------------------------------------------------------------------------------

    def walk(self, episodes: list[Episode]) -> dict[str, dict[str, Any]]:
        """Records of finished episodes by key: `trajectory`, `object` and `steps`."""
        if not episodes:
            return {}
        walks = self.agent.walk(self.data.environment(**self._options), episodes, self.beam_width)
        return {
            episode.key: {"trajectory": walk.trajectory, "object": None, "steps": list(walk.steps)}
            for episode, walk in zip(episodes, walks, strict=True)
        }
