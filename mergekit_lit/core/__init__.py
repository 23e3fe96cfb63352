"""The nouns that every layer speaks: parameters, experts, cards, records, registries, files."""
