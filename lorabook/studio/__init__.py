"""The sliders: adapters' scales in a person's hands, and the image that follows them."""
