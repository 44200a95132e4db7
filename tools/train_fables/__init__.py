"""The recipe of the shipped model: text, tokenizer, training, export, measurement."""
