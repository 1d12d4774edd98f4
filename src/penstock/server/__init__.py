"""The OpenAI image and video API in front of an engine. Never imports torch."""
