"""The packaged configurations; ``cmi-lightning predict -c NAME`` finds them by name."""
