"""Pictures, videos and sound as files: whole or not at all, with what made them written inside."""
