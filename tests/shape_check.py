"""The type checker that pytest applies to every annotated function of toto, shapes included."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
