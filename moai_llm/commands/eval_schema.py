"""Print the JSON Schema of the files that `moai eval ... --json` writes."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.evaluation.results import json_schema

    print(json.dumps(json_schema(), indent=1))
