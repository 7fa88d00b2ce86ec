"""edgekit puts language models on Intel edge devices: convert, run, profile."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert"]


def __getattr__(name: str) -> Any:
    """Resolve `edgekit.convert` on first use, so that `import edgekit` stays free of torch."""
    if name == "convert":
        from edgekit.export.pipeline import convert

        return convert
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
