"""The former place of the entry point of the command line."""

from lipgan.__main__ import main as main
