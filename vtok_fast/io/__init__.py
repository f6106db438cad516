"""Files: tokens, windows of tokens, video, atomic writing."""
