"""Configuration: YAML in, one validated `RunConfig` out."""

from megatron_bpdg.config.load import ConfigError, check_paths, dump_config, json_schema, load_config
from megatron_bpdg.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "check_paths", "dump_config", "json_schema", "load_config"]
