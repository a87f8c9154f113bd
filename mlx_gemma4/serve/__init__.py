"""HTTP: the model behind OpenAI's and Anthropic's protocols."""
