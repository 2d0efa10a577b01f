"""Packaging for tdmpc_opt_kit: everything comes from settings.ini, read with the standard library alone."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini")
cfg = parser["DEFAULT"]
python = ["3.11", "3.12"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="MIT",
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"].split(), url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research"]
                + [f"Programming Language :: Python :: {p}" for p in python],
    packages=["tdmpc_opt_kit"], include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']},<3.13",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
)
