"""The programs that train. Loading this package makes the libraries quiet before they are imported."""

from mm.program import quiet

quiet()
