"""Text in and out: tokenizer, chat prompts, parsing of answers, stop strings. Never torch."""
