"""The streamer: which weights are on the device, when they come, and who may use them."""
