"""The texts nano learns from: packages of two registries, with their licences.

Debian packages are fetched by `apt-get download`, PyPI packages by `pip download`. Only text that the licence
named here covers is read from each package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["code", "prose"]
Format = Literal["python", "rst", "html", "kjv", "wordnet", "jargon"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package: where it comes from, what is read from it and under which licence."""

    registry: Literal["debian", "pypi"]
    package: str
    version: str
    licence: str
    kind: Kind
    format: Format
    under: str = ""


def _debian(package: str, version: str, licence: str, kind: Kind, format_: Format, under: str) -> Source:
    return Source(
        registry="debian", package=package, version=version, licence=licence, kind=kind, format=format_, under=under
    )


def _pypi(package: str, version: str, licence: str) -> Source:
    return Source(registry="pypi", package=package, version=version, licence=licence, kind="code", format="python")


SOURCES: tuple[Source, ...] = (
    _debian("libpython3.11-stdlib", "3.11.2-6+deb12u8", "PSF-2.0", "code", "python", "usr/lib/python3.11"),
    _debian("libpython3.11-testsuite", "3.11.2-6+deb12u8", "PSF-2.0", "code", "python", "usr/lib/python3.11"),
    _pypi("astropy", "8.0.2", "BSD-3-Clause"),
    _pypi("bokeh", "3.9.2", "BSD-3-Clause"),
    _pypi("celery", "5.7.0", "BSD-3-Clause"),
    _pypi("dask", "2026.8.0", "BSD-3-Clause"),
    _pypi("distributed", "2026.8.0", "BSD-3-Clause"),
    _pypi("django", "5.2.19", "BSD-3-Clause"),
    _pypi("docutils", "0.23", "public domain, BSD-2-Clause"),
    _pypi("fastapi", "0.165.0", "MIT"),
    _pypi("flask", "3.1.3", "BSD-3-Clause"),
    _pypi("ipython", "9.18.1", "BSD-3-Clause"),
    _pypi("jinja2", "3.1.6", "BSD-3-Clause"),
    _pypi("jsonschema", "4.26.0", "MIT"),
    _pypi("matplotlib", "3.11.2", "Matplotlib (PSF-like)"),
    _pypi("networkx", "3.6.1", "BSD-3-Clause"),
    _pypi("nltk", "3.10.4", "Apache-2.0"),
    _pypi("pandas", "3.1.1", "BSD-3-Clause"),
    _pypi("pydantic", "2.14.3", "MIT"),
    _pypi("pygments", "2.21.0", "BSD-2-Clause"),
    _pypi("pytest", "9.2.0", "MIT"),
    _pypi("requests", "2.34.2", "Apache-2.0"),
    _pypi("rich", "15.0.0", "MIT"),
    _pypi("scikit-learn", "1.9.1", "BSD-3-Clause"),
    _pypi("setuptools", "84.2.1", "MIT"),
    _pypi("sphinx", "9.0.4", "BSD-2-Clause"),
    _pypi("sqlalchemy", "2.1.9", "MIT"),
    _pypi("statsmodels", "0.15.0", "BSD-3-Clause"),
    _pypi("sympy", "1.14.0", "BSD-3-Clause"),
    _pypi("tornado", "6.6.1", "Apache-2.0"),
    _pypi("twisted", "26.10.0", "MIT"),
    _pypi("werkzeug", "3.1.9", "BSD-3-Clause"),
    _pypi("xarray", "2026.9.0", "Apache-2.0"),
    _debian(
        "python3.11-doc", "3.11.2-6+deb12u8", "PSF-2.0", "prose", "rst", "usr/share/doc/python3.11/html/_sources"
    ),
    _debian("bible-kjv-text", "4.38", "public domain (KJV; outside the UK)", "prose", "kjv", "usr/lib"),
    _debian("wordnet-base", "1:3.0-37", "WordNet 3.0", "prose", "wordnet", "usr/share/wordnet"),
    _debian("dict-jargon", "4.4.7-3.1", "public domain", "prose", "jargon", "usr/share/dictd"),
    _debian(
        "python-django-doc", "3:3.2.25-0+deb12u3", "BSD-3-Clause", "prose", "html",
        "usr/share/doc/python-django-doc/html",
    ),
    _debian(
        "postgresql-doc-15", "15.18-0+deb12u1", "PostgreSQL", "prose", "html",
        "usr/share/doc/postgresql-doc-15/html",
    ),
    _debian("sqlite3-doc", "3.40.1-2+deb12u2", "public domain", "prose", "html", "usr/share/doc/sqlite3"),
    _debian("apache2-doc", "2.4.68-1~deb12u1", "Apache-2.0", "prose", "html", "usr/share/doc/apache2-doc/manual/en"),
)  # fmt: skip

# Needed to read the KJV's packed file; nothing of it is learned.
KJV_READER = "bible-kjv"
