"""``python -m tasks.navigation evaluate``: scores a submission file, without a model and without features."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.core.data import DataError, missing_data_message
from tasks.core.errors import UserError
from tasks.core.files import write_atomically
from tasks.navigation.data import NDH, R2R, REVERIE
from tasks.navigation.datamodule import NavigationDataModule
from tasks.navigation.evaluators import EVALUATORS, Evaluation
from tasks.navigation.submission import read_submission

METRES = ("TL", "NE", "OE", "GP", "OPE", "shortest")
NAMES = {
    "TL": "trajectory length, m",
    "NE": "navigation error, m",
    "OSR": "oracle success rate",
    "SR": "success rate",
    "SPL": "success weighted by path length",
    "nDTW": "normalized dynamic time warping",
    "sDTW": "success weighted by nDTW",
    "CLS": "coverage weighted by length score",
    "RGS": "remote grounding success",
    "RGSPL": "RGS weighted by path length",
    "GP": "goal progress, m",
    "OPSR": "oracle path success rate",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = _Parser(
        prog="python -m tasks.navigation evaluate",
        description="Score a submission against the annotations of a split. No model, no features, no vocabulary.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", choices=sorted(EVALUATORS), required=True)
    parser.add_argument("--predictions", required=True, metavar="FILE", help="submission in the leaderboard's format")
    parser.add_argument(
        "--data.root", dest="root", required=True, metavar="FOLDER", help="annotations and connectivity/"
    )
    parser.add_argument("--split", default="val_unseen")
    parser.add_argument(
        "--data.name", dest="name", default="R2R", metavar="NAME", help="R2R: beginning of the annotation files"
    )
    parser.add_argument(
        "--data.supervision",
        dest="supervision",
        choices=("oracle", "navigator", "mixed"),
        default="mixed",
        help="NDH: the path whose end is the goal (default: mixed)",
    )
    parser.add_argument(
        "--definition",
        choices=("official", "duet"),
        default="official",
        help="the official script or that of VLN-DUET, where they differ",
    )
    parser.add_argument(
        "--keep-repeats", action="store_true", help="nDTW counts a viewpoint again at every camera turn"
    )
    parser.add_argument("--output", metavar="FILE", help="figures per instruction, as .csv or .json")
    return parser


def datamodule_of(options: argparse.Namespace) -> NavigationDataModule:
    """The datamodule that reads the annotations."""
    if options.dataset == "r2r":
        return R2R(options.root, name=options.name)
    return NDH(options.root, supervision=options.supervision) if options.dataset == "ndh" else REVERIE(options.root)


def evaluate(options: argparse.Namespace) -> Evaluation:
    """Score the predictions; what is unusual about them is printed."""
    data = datamodule_of(options)
    annotation = data.annotation(options.split)
    if not annotation.is_file():
        raise DataError(
            missing_data_message(f"{annotation}: file not found.", data.layout, data.source, data.sample_command)
        )
    episodes = data.read(annotation, options.split)
    evaluator = EVALUATORS[options.dataset](episodes, data.graphs, options.definition, options.keep_repeats)
    records, notes = read_submission(Path(options.predictions), [episode.id for episode in episodes])
    if ignored := len(episodes) - len(evaluator.episodes):
        notes.append(f"{ignored} instructions beyond the third of their path are not scored by the official script")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return evaluator.evaluate(records)


def show(evaluation: Evaluation, title: str) -> None:
    """Print the means: metres, and per cent."""
    table = Table("metric", "value", "", title=title)
    for name, value in evaluation.summary.items():
        table.add_row(name, f"{value:.4f}" if name in METRES else f"{100 * value:.2f} %", NAMES.get(name, ""))
    Console().print(table)


def as_file(evaluation: Evaluation, path: Path) -> str:
    """The figures per instruction as CSV, or with the means as JSON."""
    rows = evaluation.rows()
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    plain = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    return json.dumps({"summary": evaluation.summary, "instructions": plain}, indent=1) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Run the command; whatever is wrong is one line and exit code 2."""
    options = make_parser().parse_args(arguments)
    try:
        if options.output and Path(options.output).suffix not in (".csv", ".json"):
            raise UserError(f"--output {options.output}: expected a name that ends with .csv or .json")
        evaluation = evaluate(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    scored = f"{len(evaluation.ids)} instructions in {len(np.unique(evaluation.scans))} scans"
    show(evaluation, f"{options.dataset} {options.split}: {scored}")
    if options.output:
        write_atomically(Path(options.output), as_file(evaluation, Path(options.output)))
        print(f"figures per instruction: {options.output}")
