"""The untiled encode and decode of a VAE over ranks: each holds a strip of rows of every feature map."""
