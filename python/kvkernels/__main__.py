"""python -m kvkernels: what is installed and what it can do."""

from kvkernels.info import info

print(info())
