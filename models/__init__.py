"""The parts of a language model beside its weights: the tokenizer."""
