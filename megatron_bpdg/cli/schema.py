"""`bpdg schema`: the config's fields, for editors."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON schema of the config, for editors."""

    from megatron_bpdg.config import json_schema

    print(json.dumps(json_schema(), indent=2))
