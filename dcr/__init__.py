"""Discernment via contrastive refinement: train, measure and explain less over-refusing models."""

__version__ = "0.1.0"
# What extensions do for the core, by the names under which `dcr.core.extending.part` asks for it.
# What settings choose between stands in the table of `dcr.extensions`.
PARTS: dict[str, str] = {
    "sources": "dcr.public:SOURCES",
}
