"""One file a model, one config dataclass a model."""
