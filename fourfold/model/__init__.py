"""The network, once: DeepSeek-V4 for every device and every storage format."""
