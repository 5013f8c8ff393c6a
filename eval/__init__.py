"""The programs that evaluate. Loading this package first makes the libraries quiet before they are imported."""

from mm.program import quiet

quiet()
