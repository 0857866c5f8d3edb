"""What a decoder brings beside its weights."""
