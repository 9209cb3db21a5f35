"""Packages: `dcr`, and `conf/` as `dcr/conf`, so that a wheel brings its configuration with it."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dcr", "dcr.*"]), "dcr.conf"],
    package_dir={"dcr.conf": "conf"},
)
