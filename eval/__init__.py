"""The programs that evaluate. Loading this package makes the libraries quiet before they are imported."""

from mm.program import quiet

quiet()
