"""Text in and out: tokenizer and detokeniser. Pure Python; never torch."""
