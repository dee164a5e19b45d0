"""Weights of ORIST: official checkpoints, UNITER or BERT to start from, and checkpoints of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from backbones.checkpoint import CheckpointError, LoadReport, read_state_dict, rename
from backbones.keys import Table

OLD_NORMS: Table = [(r"\.gamma$", ".weight"), (r"\.beta$", ".bias")]
PRETRAINING: Table = [
    (r"^(cls|feat_regress|region_classifier|itm_output)\.", None),
    (r"\.embeddings\.position_ids$", None),
]
LAYOUTS: Mapping[str, Table] = {
    "ORIST": [],  # the official names are ours; `model` and `module.` are stripped by the reader
    "checkpoint of ours": [(r"^(?!network\.)", None), (r"^network\.", "")],
    "UNITER": [*OLD_NORMS, *PRETRAINING],
    "BERT": [*OLD_NORMS, *PRETRAINING, (r"^bert\.", "uniter.")],
    "BERT, encoder alone": [*OLD_NORMS, (r"^", "uniter.")],
}
TABLES = ("uniter.embeddings.word_embeddings.weight", "uniter.embeddings.position_embeddings.weight")
SCORE = "r2r_output.weight"  # a file that has it was trained to navigate
LEAST_SHARE = 0.4  # BERT has no objects and no heads


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load a weight file of a known layout into an `ORISTNetwork` and say what fitted.

    Knows official ORIST checkpoints, `uniter-base.pt`, BERT in the layouts of `transformers` and of its predecessors,
    and checkpoints of our training. The words that a data set adds to BERT's follow them in the word table, so a
    shorter table of UNITER or BERT fills the first rows. Raises CheckpointError, before anything is changed, for a file
    that cannot be read safely, for one of another network, and for word tables that do not go together.
    """
    path = Path(path)
    state, target = read_state_dict(path), network.state_dict()
    candidates: dict[str, dict[str, Tensor]] = {}
    for layout, table in LAYOUTS.items():
        try:
            candidates[layout] = rename(state, table)
        except CheckpointError:  # two keys with one name: the file has another layout
            continue
    layout = max(candidates, key=lambda name: len(_fitting(candidates[name], target)))
    renamed = candidates[layout]
    _require_vocabulary(path, renamed, target)
    fitting = _fitting(renamed, target)
    report = LoadReport(
        path,
        layout,
        loaded=list(fitting),
        missing=[name for name in target if name not in renamed],
        unexpected=[name for name in renamed if name not in target],
        mismatched={
            name: (tuple(renamed[name].shape), tuple(target[name].shape))
            for name in target
            if name in renamed and name not in fitting
        },
        ignored=[name for name, tensor in state.items() if not rename({name: tensor}, LAYOUTS[layout])],
    )
    if len(fitting) < LEAST_SHARE * len(target):
        raise CheckpointError(
            f"{path} does not fit: {len(fitting)} of {len(target)} tensors found; expected weights of ORIST, UNITER or"
            " BERT with as many layers and of the same width"
        )
    network.load_state_dict(fitting, strict=False)
    return report


def _fitting(renamed: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that fit; of tables with another number of rows the common ones, followed by our own."""
    fitting = {}
    for name, own in target.items():
        given = renamed.get(name)
        if given is None:
            continue
        if given.shape == own.shape:
            fitting[name] = given
        elif name in TABLES and given.shape[1:] == own.shape[1:]:
            rows = min(len(given), len(own))
            fitting[name] = own.clone()
            fitting[name][:rows] = given[:rows]
    return fitting


def _require_vocabulary(path: Path, renamed: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    words = TABLES[0]
    if words not in renamed:
        return
    given, own = len(renamed[words]), len(target[words])
    if given > own or (given < own and SCORE in renamed):
        raise CheckpointError(
            f"{path} was trained with {given} word pieces, but the data has {own}; expected the vocabulary and the"
            " words (data.vocabulary, data.words) of its training"
        )
