"""Data sets: a folder each, with the script that prepares it; and what they share, token files and tokenizers."""
