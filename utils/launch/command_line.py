"""A script's settings from the command line and from YAML.

A value on the command line wins over `--config FILE.yaml`, which wins over `--demo`, which wins over the defaults.
"""

import os
import re
import sys
import textwrap
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from utils.config import REPOSITORY, UserError, nearest


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults beside the settings, and the description as it is written."""


def show_help_if_asked(config_class: type, demo_file: str, description: str):
    """Print the help and exit, if asked to. Scripts call it before the imports that take seconds."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        demo = (REPOSITORY / "demo" / demo_file).read_text(encoding="utf-8").partition("\n")[2]
        epilog = f"--demo takes these settings, from demo/{demo_file}:\n\n{textwrap.indent(demo, '  ')}"
        build_parser(
            config_class, description=description, epilog=epilog, usage="%(prog)s [--SETTING VALUE ...]"
        ).print_help()
        sys.exit()


def build_parser(config_class: type, **texts: str) -> HfArgumentParser:
    """A parser for the config's settings, grouped under the headings of --help."""
    parts = [part for part in reversed(config_class.__mro__) if "_argument_group_name" in vars(part)]
    parser = HfArgumentParser(parts, formatter_class=HelpFormatter, allow_abbrev=False, **texts)
    parser.set_defaults(**vars(config_class()))
    parser.add_argument("--config", help="YAML file of settings; the command line wins over it", metavar="FILE.yaml")
    parser.error = _raise_user_error
    return parser


def parse_config(config_class: type, demo_file: str, argv: list[str]) -> Any:
    """The config that `argv` asks for; UserError for an unknown or unreadable setting, with the nearest name."""
    names = [item.name for item in fields(config_class)]
    parser = build_parser(config_class)
    yaml_names = {item.name: item.type == list[str] for item in fields(config_class) if item.name != "demo"}
    given, _ = parser.parse_known_args(argv)
    demo = REPOSITORY / "demo"  # what its settings name lies there, wherever the script is started from
    from_demo = read_yaml(demo / demo_file, yaml_names) if given.demo else []
    from_demo = [re.sub("(^|=)demo/", lambda match: f"{match[1]}{demo}/", word) for word in from_demo]
    from_yaml = read_yaml(Path(given.config), yaml_names) if given.config else []
    values, unknown = parser.parse_known_args([*from_demo, *from_yaml, *argv])
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-")
        raise UserError(f"unknown setting {unknown[0]}{nearest(name, [*names, 'config'], '--')}")
    for item in fields(config_class):
        if item.metadata.get("action") == "extend" and getattr(given, item.name):
            setattr(values, item.name, getattr(given, item.name))  # and not those of the YAML too
    given_names = [word.partition("=")[0] for word in argv]
    for name in ("config", *(item.name for item in fields(config_class) if item.type == list[str])):
        if name != "predictions_file" and given_names.count(f"--{name}") > 1:
            raise UserError(f"--{name} is given twice, and only the last would count")
    for name in names:
        check_text(name, getattr(values, name))
    return config_class(**{name: getattr(values, name) for name in names})


def check_text(name: str, value: Any):
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("\0" in text or text.encode(errors="replace") != text.encode(errors="ignore")):
            raise UserError(f"--{name} {text!r}: holds what is no character of UTF-8")


def read_yaml(path: Path, names: dict[str, bool]) -> list[str]:
    """A YAML file's settings as command line words, so that both are checked and converted by the same rules."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # some can stand for gigabytes
            raise UserError(f"--config {path}: aliases (*name) are not supported: write the value out")
        settings = yaml.load(text, yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected lines of 'setting: value', found {type(settings).__name__}")
    words = []
    for name, value in settings.items():
        if name not in names:
            raise UserError(f"--config {path}: unknown setting {name!r}{nearest(str(name), list(names), '')}")
        if isinstance(value, list) and not names[name]:
            raise UserError(f"--config {path}: {name} takes one value, got a list")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value not in ("", "null", "~"):
            words += [f"--{name}={os.path.expanduser(str(value))}"]  # as a shell would
    return words


def _raise_user_error(message: str):
    raise UserError(message)
