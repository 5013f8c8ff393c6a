"""The programs that evaluate. Loading this package sets the libraries up before they are imported."""

from mm.program import prepare_libraries

prepare_libraries()
