"""The command line of every task: ``python -m tasks.<task> {fit,validate,test,predict,check} -c configs/<name>.yaml``.

LightningCLI with short class names, an import allow-list, one-line errors and a report at the end.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from backbones.checkpoint import CheckpointError
from efficiency.callback import EfficiencyCallback
from tasks.core.checkpoint import require_checkpoint_of
from tasks.core.data import TaskDataModule
from tasks.core.errors import UserError
from tasks.core.module import TaskModule
from tasks.core.optim import build_optimizer
from tasks.core.predict import PredictionWriter
from tasks.core.report import ReportCallback

ALLOWED_IMPORTS = ["tasks", "backbones", "efficiency", "lightning"]
PROJECT = Path(__file__).resolve().parents[2]
# How jsonargparse words an option it does not know, by where it was given.
UNKNOWN_OPTION = (
    r"[Uu]nrecognized arguments: (?:--)?([\w.]+)",
    r"Option '([\w.]+)' is not accepted",
    r"does not accept option '([\w.]+)'",
)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong and the nearest thing that would be right."""

    vocabulary: ClassVar[list[str]] = []  # dotted names of what the task's classes take

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and stop with exit code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [*self.vocabulary, *(action.dest for action in parser._actions if action.dest)]
        print(f"error: {one_line(message, known)}", file=sys.stderr)
        raise SystemExit(2)


def one_line(message: str, known: Sequence[str]) -> str:
    """Reduce jsonargparse's nested message to its cause; a misspelt name is compared with the dotted names `known`."""
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return (
            f"{denied[1]} is outside the packages that a configuration may import ({', '.join(ALLOWED_IMPORTS)}); "
            "--allow-import PACKAGE adds one that you trust"
        )
    if missing := re.search(r"arguments are required: (.*)", message):
        names = " and no ".join(sorted(re.findall(r"(\w+)(?:,|$)", missing[1]), reverse=True))
        return f"no {names} was given; name a configuration, e.g. -c configs/sample/faseg.yaml"
    for pattern in UNKNOWN_OPTION:
        if unknown := re.search(pattern, message):
            return f"unknown option '{unknown[1]}'{nearest(unknown[1], known)}"
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "")
    key = re.search(r'Parser key "([\w.]+)"', text)
    value = re.search(r"Given value: (.*)\Z|Got value: (.*)\Z", text, re.DOTALL)
    if not key or not value:
        return " ".join(text.split())
    given = " ".join((value[1] or value[2]).split())
    if class_name := re.search(r"Expected a dot import path string: (\S+)", text):
        classes = [name for name in known if name.isidentifier() and name != class_name[1]]
        return f"{key[1]}: no class {class_name[1]!r} for it{nearest(class_name[1], classes)}"
    if "Not a valid subclass of" in text:
        return f"{key[1]}: expected class_path and init_args, nothing else, got {textwrap.shorten(given, 100)}"
    expected = dict.fromkeys(re.findall(r"Expected an? ([^\n]+?)(?:\. Got value.*)?(?=\n|\Z)", text, re.DOTALL))
    wanted = " or ".join(kind for kind in expected if not kind.startswith("path but"))
    return f"{key[1]}: expected {wanted}, got {given}" if wanted else " ".join(text.split())


def nearest(name: str, known: Sequence[str]) -> str:
    """A question naming the known option or class closest to `name`, if one is close."""
    leaf, known = name.rpartition(".")[2], [*known, *sorted({option.partition(".")[0] for option in known})]
    group = name.partition(".")[0]
    if "." in name and group not in known:  # the first part alone is misspelt
        name, leaf = (group, group) if not difflib.get_close_matches(name, known, n=1, cutoff=0.75) else (name, leaf)
    by_leaf = {option.rpartition(".")[2]: option for option in reversed(known)}
    full = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    leaves = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)
    found = full[0] if full else by_leaf[leaves[0]] if leaves else None
    return f"; did you mean '{found}'?" if found else ""


def vocabulary(base: type, key: str) -> list[str]:
    """Class names and dotted options of all subclasses of `base`, which is given under `key`."""
    classes = [base]
    for cls in classes:  # grows while it is walked
        classes.extend(cls.__subclasses__())
    names: list[str] = [cls.__name__ for cls in classes]
    for cls in classes:
        for name, hint in typing.get_type_hints(vars(cls).get("__init__", object)).items():
            names.append(f"{key}.{name}")
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner):
                    names += [f"{key}.{name}.{field.name}" for field in dataclasses.fields(inner)]
    return sorted(set(names) - {f"{key}.return"})


class TaskTrainer(Trainer):
    """Lightning's Trainer, with the sub-command that reads the data without training."""

    def check(self) -> None:
        """Read the whole data set and list every problem with it."""


class CLI(LightningCLI):
    """LightningCLI with this project's run folder, callbacks, checks and report."""

    datamodule: TaskDataModule
    model: TaskModule

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's sub-commands and `check`."""
        return {**LightningCLI.subcommands(), "check": set()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Write once, in the data, what the model takes from it, such as the number of classes."""
        parser.add_argument(
            "--output", type=str | None, default=None, help="Folder of `predict` (default: the run folder)."
        )
        for source, option in cast(type[TaskModule], self._model_class).from_data.items():
            parser.link_arguments(f"data.{source}", f"model.init_args.{option}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: a checkpoint resumes the training, it does not change the settings."""

    def prepare(self) -> None:
        """Find the data and read what else is needed, so that what is wrong stops a run before its first file."""
        self.datamodule.prepare_data()
        self.datamodule.setup(str(self.subcommand))
        self.model.setup(str(self.subcommand))
        self._apply_efficiency_methods()
        if self.subcommand == "fit":
            build_optimizer(self.model.network, self.model.optim)
        if ckpt_path := self._get(self.config, "ckpt_path"):
            require_checkpoint_of(self.model, Path(ckpt_path), training=self.subcommand == "fit")

    def _apply_efficiency_methods(self) -> None:
        """Let the callbacks of efficiency methods change the network, whose checkpoints have other tensors then."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EfficiencyCallback):
                try:
                    callback.setup(self.trainer, self.model, str(self.subcommand))
                except ValueError as error:
                    raise UserError(f"trainer.callbacks: {error}") from error

    before_fit = before_validate = before_test = before_predict = prepare

    def before_instantiate_classes(self) -> None:
        """Stop without a model or data; `check` needs the data alone."""
        for key in ("model", "data"):
            if self._get(self.config, key) is None:
                raise UserError(f"no {key} was given; name a configuration, e.g. -c configs/sample/faseg.yaml")
        if self.subcommand == "check":
            config = self.config["check"]
            parser = Parser()
            parser.add_subclass_arguments(TaskDataModule, "data")
            datamodule = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
            raise SystemExit(0 if datamodule.check() else 1)
        options = self._get(self.config, "model").init_args
        for source, option in cast(type[TaskModule], self._model_class).from_data.items():
            if options.get(option) is not None:
                raise UserError(f"model.{option}: {options[option]} was given, but it follows from the data ({source})")
        if self._get(self.config, "ckpt_path"):
            if "pretrained" in options:
                options.pretrained = False  # the checkpoint replaces all weights; nothing is to be downloaded for it
        elif self.subcommand != "fit" and not options.weights:
            rank_zero_warn(
                f"{self.subcommand}: neither --model.weights nor --ckpt_path was given; the head is untrained"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run folder, loggers, checkpoints, progress bar, report and prediction writer."""
        config = self._get(self.config_init, "trainer")
        self.report = ReportCallback(config=self.run_name)
        callbacks: list[Callback] = [self.report]
        if config.enable_progress_bar is not False:
            # rich draws nothing into a log file
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else TQDMProgressBar(refresh_rate=50))
        if config.logger is None and not config.fast_dev_run:
            csv = CSVLogger(self.run_folder, name=self.run_name)
            kwargs["logger"] = [csv]
            if self.subcommand == "fit":
                kwargs["logger"].append(TensorBoardLogger(self.run_folder, name=self.run_name, version=csv.version))
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if self.subcommand == "fit" and config.enable_checkpointing is not False and not config.fast_dev_run:
            callbacks += best_and_last(self.model)
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(self._get(self.config, "output")))
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an unknown accelerator, strategy, number of devices
            raise UserError(f"trainer: {error}") from error

    @property
    def run_folder(self) -> str:
        """Where runs are kept: `trainer.default_root_dir`, or ``runs/<task>``."""
        return self._get(self.config_init, "trainer").default_root_dir or str(Path("runs") / self.model.task)

    @property
    def run_name(self) -> str:
        """The name of the last configuration file, e.g. ``faseg`` or ``sample/faseg``."""
        files = self._get(self.config, "config") or []
        if not files:
            return type(self.model).__name__.lower()
        path = Path(str(files[-1]))
        return f"sample/{path.stem}" if path.parent.name == "sample" else path.stem

    def fit(self, **kwargs: Any) -> None:
        """Train, then evaluate the best checkpoint so that the report speaks of the weights to be used."""
        self.trainer.fit(**kwargs)
        checkpoint = self.trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint) or self.trainer.interrupted:
            return
        # A resumed training whose best weights are those of the earlier run may no longer find them. Rank 0 decides.
        best = checkpoint.best_model_path
        if best := self.trainer.strategy.broadcast(best if Path(best).is_file() else ""):
            rank_zero_info(f"evaluating the best checkpoint: {best}")
            self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """Predict; the results go to files, not to memory."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


def best_and_last(model: TaskModule) -> list[Callback]:
    """`best.ckpt` by the task's headline metric and `last.ckpt`, written at every validation.

    Lightning's own `save_last` writes nothing at a validation that is not the best so far.
    """
    best = ModelCheckpoint(
        monitor=model.monitor,
        mode=model.mode,
        filename="best",
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    return [best, ModelCheckpoint(filename="last", enable_version_counter=False)]


def prepare_arguments(args: list[str]) -> list[str]:
    """Apply ``--allow-import PACKAGE`` and find ``-c configs/...`` beside the packages when it is not here."""
    args, allowed = list(args), list(ALLOWED_IMPORTS)
    while "--allow-import" in args:
        at = args.index("--allow-import")
        if at + 1 == len(args):
            raise UserError("--allow-import: expected the name of a Python package")
        allowed.append(args[at + 1])
        del args[at : at + 2]
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=allowed, config_read_mode_fsspec_enabled=False
    )
    args = [part for argument in args for part in split_config_flag(argument)]
    for at, (flag, value) in enumerate(itertools.pairwise(args), start=1):
        if flag in ("-c", "--config"):
            args[at] = str(find_config(value))
    return args


def split_config_flag(argument: str) -> list[str]:
    """``--config=FILE`` and ``-cFILE`` as two arguments."""
    joined = re.fullmatch(r"(--config)=(.+)|(-c)=?([^-=].*)", argument)
    return [part for part in joined.groups() if part] if joined else [argument]


def find_config(value: str) -> Path:
    """The configuration file, here or beside the packages; `UserError` unless it can be read and holds YAML options."""
    path = next((path for path in (Path(value), PROJECT / value) if path.exists()), None)
    if path is None:
        raise UserError(f"-c {value}: no such file; `python -m tasks` lists the configurations")
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        kind = "nothing" if options is None else f"a {type(options).__name__}"
        raise UserError(f"{path}: holds {kind}; expected options such as 'model:' and 'data:'")
    return path


def message_for_user(error: BaseException | None) -> str | None:
    """The message of the error, or of the one it was made from, that is meant for the user; None for a defect."""
    while error is not None:
        if isinstance(error, UserError | CheckpointError | MisconfigurationException):
            return str(error)
        error = error.__cause__ or error.__context__  # jsonargparse wraps what a constructor raises
    return None


def main(module: type[TaskModule], datamodule: type[TaskDataModule], args: list[str] | None = None) -> None:
    """Run the command line of one task and print the path of the report last.

    Args:
        module: The task's base LightningModule; its imported subclasses are the short names of `model`.
        datamodule: The task's base datamodule; likewise for `data`.
        args: Arguments instead of `sys.argv[1:]`.
    """
    # Lightning advertises packages of its vendor, and warns about its own use of torch.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    try:
        if args is None:
            sys.argv[1:] = prepare_arguments(sys.argv[1:])
        else:
            args = prepare_arguments(args)
        Parser.vocabulary = [*vocabulary(module, "model"), *vocabulary(datamodule, "data")]
        cli = CLI(
            module,
            datamodule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_class=TaskTrainer,
            trainer_defaults={"use_distributed_sampler": False},  # the datamodules divide the data themselves
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except Exception as error:
        message = message_for_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    if cli.report.path:  # rank 0 alone wrote it
        for name, value in sorted(cli.trainer.callback_metrics.items()):
            if name.startswith(("val", "test")):  # also val_unseen/SR
                print(f"{name}: {float(value):.4f}")
        print(f"report: {cli.report.path}", flush=True)
