"""The Debian packages that the corpus is made of."""

import dataclasses

# The largest size of a dictionary, in bytes.
DICTIONARY = 1 << 30
CODE = r"\.(c|h|S|py|go|rs|java|el|pm|pl|pod|hpp|cpp|ipp|pas|pp|inc|rb|vim|rst|txt|md|texi|dts|dtsi|sh)$"
MAN = r"/man/man\d/[^/]+$"
HTML = r"\.x?html?$"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Debian package.

    Attributes:
        package: its name.
        only: pattern of the paths to read. It also applies to files in archives within the package.
        share: the share of its files to read. A hash of the path chooses them.
        largest: the most bytes of a file. Larger files are tables that a program wrote.
    """

    package: str
    only: str
    share: float = 1.0
    largest: int = 300_000


SOURCES = (
    Source("linux-source-6.1", CODE, 0.22),
    Source("golang-1.19-src", CODE),
    Source("rust-src", CODE),
    Source("openjdk-17-source", CODE, 0.5),
    Source("libboost1.81-dev", CODE, 0.4),
    Source("fpc-source-3.2.2", CODE, 0.4),
    Source("lazarus-src-2.2", CODE, 0.5),
    Source("emacs-el", CODE),
    Source("libpython3.11-stdlib", CODE),
    Source("libpython3.11-testsuite", CODE),
    Source("python3-django", CODE),
    Source("python3-sympy", CODE),
    Source("python3-scipy", CODE),
    Source("python3-numpy", CODE),
    Source("python3-matplotlib", CODE),
    Source("perl-modules-5.36", CODE),
    Source("perl-doc", CODE),
    Source("vim-runtime", CODE),
    Source("manpages", MAN),
    Source("manpages-dev", MAN),
    Source("glibc-doc", MAN),
    Source("freebsd-manpages", MAN),
    Source("python3.11-doc", HTML),
    Source("linux-doc-6.1", r"/Documentation/.*\.(rst|txt)$"),
    Source("rust-doc", r"/html/(book|reference|nomicon|rust-by-example|edition-guide|cargo|rustc|rustdoc)/.*\.html$"),
    Source("postgresql-doc-15", HTML),
    Source("git-doc", r"\.txt$"),
    Source("sqlite3-doc", HTML),
    Source("llvm-14-doc", HTML, 0.5),
    Source("cmake-doc", r"\.rst$|" + HTML),
    Source("apache2-doc", r"/en/.*\.html$"),
    Source("postfix-doc", HTML),
    Source("erlang-doc", HTML, 0.5),
    Source("gap-doc", r"\.txt$"),
    Source("octave-doc", HTML),
    Source("debian-handbook", r"/en-US/.*html$"),
    Source("debian-policy", r"\.txt(\.gz)?$"),
    Source("developers-reference", r"/developers-reference/[^/]*\.html$"),
    Source("debian-reference-en", HTML),
    Source("installation-guide-amd64", r"/en/.*\.html?$"),
    Source("libreoffice-help-en-us", HTML),
    Source("gimp-help-en", HTML),
    Source("dict-gcide", r"\.dict$", largest=DICTIONARY),
    Source("dict-foldoc", r"\.dict$", largest=DICTIONARY),
    Source("dict-jargon", r"\.dict$", largest=DICTIONARY),
    Source("wordnet-base", r"/data\.\w+$", largest=DICTIONARY),
    Source("bible-kjv-text", r"\.(txt|rawtext)$", largest=DICTIONARY),
    Source("fortunes", r"/fortunes/[\w-]+$"),
    Source("fortunes-min", r"/fortunes/[\w-]+$"),
    Source("miscfiles", r".", largest=DICTIONARY),
)
