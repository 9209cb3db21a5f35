"""Packages: `dcr`, `hydra_plugins`, and `conf/` as `dcr/conf`, so that a wheel brings it all."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dcr", "dcr.*", "hydra_plugins"]), "dcr.conf"],
    package_dir={"dcr.conf": "conf"},
)
