"""Models: which families the collector knows, what a checkpoint holds, and how it is loaded and quantized."""
