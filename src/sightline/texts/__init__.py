"""Texts become token ids: byte pairs, and the vocabularies that say which."""
