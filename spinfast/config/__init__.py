"""The configuration tree: frozen, validated, each field documented once, beside itself.

A config is one YAML file of the sections below; `section.key=value` overrides a single field. An unknown key
is an error that names the nearest valid one. The resolved tree is saved with every run.
`python -m spinfast.config` prints this reference as a Markdown table.
"""

from spinfast.config.adapters import Calm, Full, Lora, LoraXs, TinyLora
from spinfast.config.methods import (
    PAIRED,
    REFERENCE_FREE,
    UNPAIRED,
    Dpo,
    Optimisation,
    Passes,
    Sft,
    Spin,
    Watched,
    at,
)
from spinfast.config.reading import load_config, parse_config, plain_yaml, validated
from spinfast.config.reference import reference_table
from spinfast.config.sections import Data, Section, Source
from spinfast.config.tree import Config

__all__ = [
    "PAIRED",
    "REFERENCE_FREE",
    "UNPAIRED",
    "Calm",
    "Config",
    "Data",
    "Dpo",
    "Full",
    "Lora",
    "LoraXs",
    "Optimisation",
    "Passes",
    "Section",
    "Sft",
    "Source",
    "Spin",
    "TinyLora",
    "Watched",
    "at",
    "load_config",
    "parse_config",
    "plain_yaml",
    "reference_table",
    "validated",
]
