"""Which layers Mesa compresses and how: settings by kind of layer, and the official policy files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Kinds of layers that official files name; the second row is read, but names layers that keep nothing.
TAGS = ("conv", "fc", "gelu", "bn", "relu", "softmax", "matmul", "layernorm")
SILENT_TAGS = ("eltwise", "shuffle", "concat", "norm")
KEYS = ("enable", "level", "ema_decay")


@dataclass(frozen=True)
class Setting:
    """How activations of one kind of layer are kept.

    Args:
        enable: Keep them in 8 bits (ReLU: one bit).
        levels: Number of codes, 2 to 256; fewer take no less memory.
        decay: Of the running range.
    """

    enable: bool = True
    levels: int = 256
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels is {self.levels}, expected 2 to 256")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}, expected at least 0 and below 1")


@dataclass(frozen=True)
class Policy:
    """A setting per kind of layer.

    `matmul` is what attention keeps outside of its own linear layers: queries, keys, values, probabilities, output.
    `other` are layers of one operation that have no kind of their own, such as SiLU. `functional` is code between
    layers, off because a logarithm or a quotient of restored numbers has no bounds.
    """

    fc: Setting = field(default_factory=Setting)
    conv: Setting = field(default_factory=Setting)
    gelu: Setting = field(default_factory=Setting)
    relu: Setting = field(default_factory=Setting)
    bn: Setting = field(default_factory=Setting)
    layernorm: Setting = field(default_factory=Setting)
    softmax: Setting = field(default_factory=Setting)
    matmul: Setting = field(default_factory=Setting)
    other: Setting = field(default_factory=Setting)
    functional: Setting = field(default_factory=lambda: Setting(enable=False))


Rule = dict[str, Any]
Unit = tuple[str, int, Setting]  # tag (that of an operand ends in -1 or -2), number among the layers of its kind


def parse_policy(text: str) -> dict[str, list[Rule]]:
    """Read an official policy file: rules by tag, values as written, before them the section's trigger epochs.

    A section starts with ``on <tag>:``, a rule with its first ``by_index`` or ``by_tag`` after a setting. A line
    without a colon ends the file. Raises ValueError for tags and keys that do not exist.
    """
    sections: dict[str, list[Rule]] = defaultdict(list)
    section: list[Rule] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            break
        if header := re.fullmatch(r"on\s+(\w+)", key):
            if header[1] not in (*TAGS, *SILENT_TAGS):
                raise ValueError(f"line {number}: no kind of layer {header[1]!r}, expected one of {', '.join(TAGS)}")
            section = sections[header[1]]
            section.append({"trigger": [int(epoch) for epoch in re.findall(r"\d+", value)]})
        elif section is None:
            raise ValueError(f"line {number}: {line!r} stands before any `on <kind>:`")
        elif key not in ("by_index", "by_tag", *KEYS):
            raise ValueError(f"line {number}: no setting {key!r}, expected by_index, by_tag, {', '.join(KEYS)}")
        else:
            rule = section[-1]
            if "trigger" in rule or (key.startswith("by_") and not rule.keys().isdisjoint(KEYS)):
                rule = {}
                section.append(rule)
            words = re.split(r"[,\s]+", value)
            rule[key] = words if len(words) > 1 else value
    return dict(sections)


def deploy(rules: Mapping[str, Sequence[Rule]], units: Mapping[str, tuple[str, int]]) -> dict[str, Setting]:
    """Apply rules in their order to layers, (tag, index) by name; what no rule names is off.

    A tag that ends in -1 or -2 is an operand of a matrix product, or input and output of a softmax.
    """
    settings = {}
    for name, (tag, index) in units.items():
        setting = Setting(enable=False)
        for rule in rules.get(tag.partition("-")[0], ()):
            chosen, operand = rule.get("by_index", "all"), rule.get("by_tag", tag)
            if (
                "trigger" in rule
                or (chosen != "all" and str(index) not in _words(chosen))
                or tag not in _words(operand)
            ):
                continue
            setting = _changed(setting, rule)
        settings[name] = setting
    return settings


def _words(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _changed(setting: Setting, rule: Rule) -> Setting:
    changes: dict[str, Any] = {}
    try:
        if "enable" in rule:
            changes["enable"] = rule["enable"] not in ("False", "false")
        if "level" in rule:
            changes["levels"] = int(rule["level"])
        if "ema_decay" in rule:
            changes["decay"] = float(rule["ema_decay"])
    except (TypeError, ValueError):
        raise ValueError(f"level and ema_decay of {rule}: expected a number each") from None
    return replace(setting, **changes)


def read_rules(path: str | Path) -> dict[str, list[Rule]]:
    """Read an official policy file. Raises ValueError, naming the file, when it is missing or wrong."""
    try:
        return parse_policy(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"policy {path}: cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"policy {path}: {error}") from None
