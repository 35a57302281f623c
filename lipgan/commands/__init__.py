"""The commands of ``lipgan``: flags in parser.py, a module each, what they share in console.py and sources.py."""
